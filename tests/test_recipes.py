"""The study of recipes: the base is the product, and each recipe changes what it says, no more."""

import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate.progressive_sampler import sample_passes
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import layers, progressive_prior
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.train.cell_orders import mixed_orders
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.progressive_stage import ProgressiveStage
from dalle_jax.train.state import init_state
from dalle_jax.train.train_step import make_train_step

with pytest.MonkeyPatch.context() as patch:  # the folder's emoji.py would hide a package
    patch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    import recipe_programs
    import recipes
    from recipe_programs import PROGRAMS, RECIPES, Numbers

SIZES = {"width": 16, "depth": 2, "heads": 2, "text_vocabulary": 20, "text_length": 4, "grid": 4}
MODEL = PriorConfig(**SIZES, codes=12, kernel=3)
TEXT = jnp.array([[1, 2, 3], [4, 5, 22], [6, 21, 22]])  # from 20 on, pads
CODES = jnp.asarray(np.random.default_rng(0).integers(0, 12, (3, 16)), jnp.int32)
BATCH = {"text": TEXT, "codes": CODES.reshape(3, 4, 4)}
NOTHING = {"codec_model": None, "tokenizer": None, "validation": tuple, "captions": ()}


def tiny_prior():
    loop = LoopConfig(steps=8, ema_every=5, ema_decay=0.98)
    return short_prior_run(
        model=MODEL, loop=loop, batch_size=2, warmup_steps=2, caption_dropout=0.5
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for module in (recipe_programs, recipes):
        monkeypatch.setattr(module, "prior", tiny_prior)


def stage(name, steps=8, **numbers):
    program = PROGRAMS[name]
    return program.stage(program.run(steps), Numbers(**numbers))


def random_params(name, seed=0):
    """Weights without zeros, so that everything matters."""
    shapes = PROGRAMS[name].lower(stage(name).init, jax.random.key(0)).out_info
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)


def logits(name, params, text=TEXT, codes=CODES):
    s = stage(name)
    when, _ = s.plan(jax.random.key(0), codes.shape)
    return np.asarray(
        PROGRAMS[name]
        .lower(s.logits, params, text, codes, when)
        .compile()(params, text, codes, when)
    )


@pytest.mark.parametrize(
    ("name", "product"), [("progressive", ProgressiveStage), ("autoregressive", PriorStage)]
)
def test_the_base_has_the_loss_of_the_product(name, product, key):
    s, params = stage(name), random_params(name)
    wanted, _ = jax.jit(product(s.run, **NOTHING).loss)(params, BATCH, key, 3)
    found, _ = jax.jit(s.loss)(params, BATCH, key, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def data(**changes):
    """Five images, of which the last is held out."""
    rng = np.random.default_rng(1)
    text, codes = rng.integers(0, 20, (5, 3)), rng.integers(0, 12, (5, 16))
    arrays = {"text": text, "codes": codes, "empty": np.arange(20, 23)}
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return arrays | {"seen": np.arange(5) < 4} | changes


@pytest.mark.slow
def test_the_base_trains_as_the_product_does_beside_other_recipes_and_seeds():
    steps, program = 8, PROGRAMS["progressive"]
    chosen = [RECIPES["muon-0.003"], RECIPES["base"]]
    args = recipes.inputs(data(), chosen, steps, range(2))
    found = program.lower(recipes.training(program, steps), *args).compile()(*args)
    s = ProgressiveStage(program.run(steps), **NOTHING)
    state, step = init_state(s, args[1][1]), make_train_step(s, ema_every=5, ema_decay=0.98)
    shown, dropped = recipes.batches(1, 4, steps)
    for images, lost in zip(shown, dropped, strict=True):
        text = np.where(lost[:, None], data()["empty"], data()["text"][images])
        state, _ = step(state, {"text": text, "codes": data()["codes"][images]})
    base = jax.tree.map(lambda x: x[1, 1], found)  # second recipe, second seed
    chex.assert_trees_all_close(base, {"EMA": state.ema_params, "last": state.params}, atol=2e-5)
    other = jax.tree.map(lambda x: x[0, 1], found)["last"]["layers"]["mlp_in"]["kernel"]
    assert np.abs(other - base["last"]["layers"]["mlp_in"]["kernel"]).max() > 1e-3


def test_each_epoch_shows_each_image_once_and_a_share_without_caption():
    shown, dropped = recipes.batches(0, 10, 50)
    assert shown.shape == dropped.shape == (50, 2)
    epochs = shown.reshape(10, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert not (epochs[0] == epochs[1]).all()
    assert 0.35 < dropped.mean() < 0.65


@pytest.mark.parametrize(
    ("trapezoid", "wanted"),
    [(1.0, [0, 1000, 2000, 2000, 2000, 1050, 100]), (0.0, [0, 1000, 2000, 1050, 928, 336, 100])],
)
def test_the_learning_rate_rises_and_falls_by_its_schedule(trapezoid, wanted):
    s = stage("progressive", 100, trapezoid=trapezoid)
    rate = recipe_programs.schedule(s.run, s.numbers)
    found = [float(rate(step)) * 1e6 for step in (0, 1, 2, 51, 55, 77.5, 100)]
    np.testing.assert_allclose(found, wanted, atol=1)


def test_an_order_is_annealed_in_the_third_quarter():
    s = stage("progressive", 100, first_random=1.0, last_random=0.0)
    shares = [float(s.random_share(step)) for step in (0, 50, 62.5, 75, 100)]
    assert shares == [1, 1, 0.5, 0, 0]
    mixed = partial(mixed_orders, jax.random.key(0), (400, 9))
    raster = lambda share: (np.asarray(mixed(share)) == np.arange(9)).all(axis=1).mean()  # noqa: E731
    assert raster(0.0) == 1
    assert raster(1.0) == 0
    assert 0.65 < raster(0.3) < 0.75


def test_label_smoothing_mixes_in_the_nats_of_all_codes(key):
    params = random_params("progressive")
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def measured(params, smoothing):
        s = stage("progressive", smoothing=smoothing)
        return s.loss(params, BATCH, key, 3)[0], s.nats(params, TEXT, CODES, key)

    smoothed, nats = zip(*(measured(params, x) for x in (0.0, 0.1, 1.0)), strict=True)
    np.testing.assert_allclose(smoothed[1], 0.9 * smoothed[0] + 0.1 * smoothed[2], rtol=1e-6)
    assert abs(smoothed[2] - smoothed[0]) > 0.1
    np.testing.assert_allclose(measured(zeros, 1.0)[0], np.log(12), rtol=1e-6)
    np.testing.assert_array_equal(nats, nats[0])  # measured without it


def test_zero_outputs_are_the_only_first_weights_that_differ(key):
    base, zero = (stage("progressive", outputs=x).init(key) for x in (1.0, 0.0))
    for name in ("attention_out", "mlp_out"):
        assert not np.any(zero["layers"][name]["kernel"])
        assert np.any(base["layers"][name]["kernel"])
        zero["layers"][name] = base["layers"][name]
    chex.assert_trees_all_equal(zero, base)


def test_adamw_moves_matrices_where_the_program_says_so(key):
    moments = {}
    for name in ("progressive", "adamw"):
        s = stage(name)
        state = jax.eval_shape(lambda key, s=s: s.optimizer.init(s.init(key)), key)
        found = jax.tree.leaves_with_path(state)
        moments[name] = sum("mlp_in" in jax.tree_util.keystr(path) for path, _ in found)
    assert moments["adamw"] > moments["progressive"]


@pytest.mark.parametrize(
    ("name", "base", "normed"),
    [
        ("no QK norm", "progressive", False),
        ("autoregressive, QK norm", "autoregressive", True),
    ],
)
def test_qk_norm_is_there_or_not(name, base, normed):
    params = random_params(base)
    larger = jax.tree.map(np.array, params)
    for part in larger["layers"]["qkv"].values():  # L [D] 3 N H: of queries and keys
        part[..., :2, :, :] *= 3
    unmoved = {
        x: np.allclose(logits(x, params), logits(x, larger), atol=1e-3) for x in (name, base)
    }
    assert unmoved == {name: normed, base: not normed}


def test_relu_squared_takes_the_place_of_gelu():
    x = jnp.array([-1.0, 0.0, 2.0])
    assert recipe_programs.relu_squared(x).tolist() == [0, 0, 4]
    params = random_params("progressive")
    negative = params | {"layers": params["layers"] | {"mlp_in": {
        "kernel": 0 * params["layers"]["mlp_in"]["kernel"],
        "bias": 0 * params["layers"]["mlp_in"]["bias"] - 1,
    }}}  # fmt: skip
    other = jax.tree.map(np.array, negative)
    other["layers"]["mlp_out"]["kernel"] *= 2
    for name, dead in (("ReLU squared", True), ("progressive", False)):
        same = np.allclose(logits(name, negative), logits(name, other), atol=1e-4)
        assert same == dead, name


def test_rms_norm_has_a_gain_alone_everywhere():
    x = jnp.array([3.0, 4.0])
    found = recipe_programs.rms_norm({"scale": jnp.array([1.0, 2.0])}, x, epsilon=0.0)
    np.testing.assert_allclose(found, [3 / 12.5**0.5, 8 / 12.5**0.5], rtol=1e-6)
    count = {x: len(jax.tree.leaves(random_params(x))) for x in ("progressive", "RMS norm")}
    assert count["progressive"] - count["RMS norm"] == 4  # two of the layers, memory, the last
    params = random_params("RMS norm")
    assert np.isfinite(logits("RMS norm", params)).all()


def test_rotary_attention_sees_how_far_cells_are_apart():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 8)).astype(np.float32)
    T = 3 + 16

    def turned(x):
        return np.asarray(recipe_programs.rotary(jnp.broadcast_to(x, (1, T, 1, 8)), 4))[0, :, 0]

    text, cells = np.split(turned(query), [3])
    np.testing.assert_array_equal(text, np.broadcast_to(query, (3, 8)))
    cells, others = cells.reshape(4, 4, 8), turned(key)[3:].reshape(4, 4, 8)
    np.testing.assert_allclose(cells[0, 0], query, rtol=1e-6)
    product = lambda a, b: float(cells[a] @ others[b])  # noqa: E731
    np.testing.assert_allclose(product((0, 1), (2, 2)), product((1, 2), (3, 3)), rtol=1e-4)
    assert abs(product((0, 1), (2, 2)) - product((0, 1), (2, 3))) > 1e-3
    assert abs(product((0, 1), (2, 2)) - product((0, 1), (3, 2))) > 1e-3


@pytest.mark.parametrize("name", ["no QK norm", "2-D rotary", "ReLU squared"])
def test_a_variant_changes_the_logits_but_no_parameter(name):
    params = random_params("progressive")
    chex.assert_trees_all_equal(random_params(name), params)
    assert np.abs(logits(name, params) - logits("progressive", params)).max() > 1e-3


def test_nothing_stays_replaced():
    before = (progressive_prior._qk_norm, progressive_prior.dense, layers.layer_norm)
    for name in ("no QK norm", "2-D rotary", "RMS norm"):
        random_params(name)
    assert before == (progressive_prior._qk_norm, progressive_prior.dense, layers.layer_norm)


def test_the_ordered_prior_is_the_products_with_an_order_that_a_recipe_says(key):
    name = "autoregressive, ordered"
    s, params = stage(name, last_random=0.0), random_params(name)
    raster = stage(name, first_random=0.0, last_random=0.0)
    of = [jax.jit(x.loss) for x in (PriorStage(s.run, **NOTHING), s, raster)]
    for step in (3, 5, 8):  # random, mixed, raster
        product, annealed, always_raster = (float(x(params, BATCH, key, step)[0]) for x in of)
        assert annealed == pytest.approx(product, rel=1e-6)
        assert (abs(always_raster - product) < 1e-5) == (step == 8)


def test_samples_are_those_of_the_products_sampler():
    params = random_params("progressive")
    params["head"]["image"]["kernel"] *= 1e4  # so that nothing is left to chance
    s = stage("progressive", last_random=0.0)  # raster
    sampled = recipes.sample(s, params, TEXT, CODES.shape, jax.random.key(0))
    sampling = SamplingConfig(order="raster", stages=8)
    keys = jax.random.split(jax.random.key(1), 3)
    *_, last = sample_passes(s.config, params, TEXT, keys, sampling=sampling)
    np.testing.assert_array_equal(sampled.reshape(3, 4, 4), last[-1])


def test_an_autoregressive_sample_follows_its_own_codes():
    params = random_params("autoregressive")
    params["head"]["image"]["kernel"] *= 1e4
    s = stage("autoregressive")
    sampled = recipes.sample(s, params, TEXT, CODES.shape, jax.random.key(0))
    np.testing.assert_array_equal(
        logits("autoregressive", params, codes=sampled).argmax(-1), sampled
    )


def test_nats_and_samples_come_for_each_recipe_and_seed():
    name = "autoregressive, ordered"
    numbers = jax.tree.map(lambda *x: jnp.array(x), Numbers(), Numbers(), Numbers())
    params = jax.tree.map(lambda x: jnp.ones((3, 2, *x.shape)), random_params(name))
    text, codes = jnp.zeros((2, 5, 3), jnp.int32), jnp.zeros((2, 5, 16), jnp.int32)
    judge = recipes.judging(PROGRAMS[name], 8)
    nats, samples = PROGRAMS[name].lower(judge, numbers, params, text, codes).out_info
    assert nats.shape == (3, 2, 2)
    assert samples.shape == (3, 2, 10, 16)


def test_recipes_are_trained_once_and_come_out_as_a_table(tmp_path, monkeypatch, capsys):
    def training(program, steps):
        def train(numbers, key, shown, *others):
            x = jnp.ones((len(numbers.muon), len(key), 7)) * shown.shape[1]
            return {"EMA": {"x": x}, "last": {"x": x + 1}}

        return train

    def judging(program, steps):
        def judge(numbers, params, text, codes):
            nats = jnp.broadcast_to(params["x"][..., :1], (*params["x"].shape[:2], 2))
            return nats, jnp.zeros((*nats.shape[:2], 2, 16), jnp.int32)

        return judge

    monkeypatch.setattr(recipes, "training", training)
    monkeypatch.setattr(recipes, "judging", judging)
    monkeypatch.setattr(recipes.dalle_jax, "load", lambda name: None)
    monkeypatch.setattr(recipes.Truth, "decode", lambda self, codes: np.asarray(codes, np.float32))
    np.savez(tmp_path / "data.npz", **data())
    (tmp_path / "ratios.json").write_text(json.dumps({"progressive": 1.0, "adamw": 0.5}))
    out = tmp_path / "lines.jsonl"
    options = {"data": tmp_path / "data.npz", "out": out, "seeds": 2, "images": 1, "updates": 6}
    options["equal_time"] = tmp_path / "ratios.json"
    recipes.train(recipes.Train(**options, recipes=("base",)))
    recipes.train(recipes.Train(**options, recipes=("adamw", "base", "adamw-0.004")))
    lines = recipes.read(out)
    assert [(x["recipe"], x["updates"], x["runs at once"]) for x in lines] == [
        ("base", 6, 2),
        ("adamw", 12, 4),
        ("adamw-0.004", 12, 4),
    ]
    assert {line["parameters"] for line in lines} == {7}
    capsys.readouterr()
    recipes.table(recipes.Table(lines=out))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0][2:] for row in rows] == [
        *("recipe", "---", "base", "base, EMA", "adamw", "adamw-0.004"),
    ]
    assert rows[2].startswith("| base | 6 | 7 | 7.000 (7.000, 7.000) |")


def test_a_sample_is_right_if_its_own_image_is_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.dalle_jax, "load", lambda name: None)
    monkeypatch.setattr(recipes.Truth, "decode", lambda self, codes: np.asarray(codes, np.float32))
    images = 10 * np.eye(5, 16, dtype=np.int32)
    seen = np.array([True, True, True, False, False])
    np.savez(tmp_path / "data.npz", **data(codes=images, seen=seen))
    truth = recipes.Truth(recipes.Train(data=tmp_path / "data.npz", out=tmp_path, images=2))
    assert set(truth.own[0]) < {0, 1, 2}
    assert set(truth.own[1]) == {3, 4}
    right = images[truth.own.ravel()] + 1
    wrong = right.copy()
    wrong[3] = images[truth.own[1, 0]]
    nats = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert truth.compare(nats, [right, wrong]) == {
        "nats, seen": [1, 3],
        "nats, held out": [2, 4],
        "right, seen": [1, 1],
        "right, held out": [1, 0.5],
    }


def test_recipes_name_programs():
    assert {recipe.program for recipe in RECIPES.values()} == set(PROGRAMS)
