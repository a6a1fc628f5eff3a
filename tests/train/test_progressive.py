"""Orders of cells, partial pictures, and the stage that learns from them."""

import dataclasses
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.generate.progressive import filled
from dalle_jax.models.transformer import Prior, draw_params
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.orders import order_scores, ranks
from dalle_jax.train.prior import short_prior_run
from dalle_jax.train.progressive import ProgressiveRun, ProgressiveStage, in_progressive_style

CONFIG = dataclasses.replace(tiny.parts()["prior"], style="progressive")
K = CONFIG.codes
TEXT = np.zeros((3, CONFIG.text_length - 1), np.int32)
CODES = np.random.default_rng(0).integers(0, K, (3, 4, 4), np.int32)


SHAPES = jax.eval_shape(partial(draw_params, CONFIG), jax.random.key(0))
PARAMS = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), SHAPES)  # all codes equally likely


def stage(validation=(), tokens=None, **changes):
    settings = {"loop": LoopConfig(steps=10), "batch_size": 3, "warmup_steps": 1, "stages": 4}
    prior = short_prior_run(model=tiny.parts()["prior"])
    run = in_progressive_style(prior, **(settings | changes))
    tokens = tokens or tiny.model(prior=None, prior_params=None, tokenizer=None)
    return ProgressiveStage(
        run,
        tokens=tokens,
        tokenizer=tiny.tokenizer(),
        validation=lambda: iter(validation),
        captions=["red apple"],
    )


def test_it_begins_with_all_that_the_autoregressive_prior_has_too():
    tokens = tiny.model()
    begun = stage(tokens=tokens, from_prior=True).begin(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(begun, PARAMS)
    _, given = tokens.priors["prior"]
    chex.assert_trees_all_equal(begun["layers"], jax.device_get(given["layers"]))
    for part, other in (("embed", "mask"), ("head", "fill")):
        same = {name: jax.device_get(x) for name, x in given[part].items() if name in begun[part]}
        chex.assert_trees_all_equal({k: v for k, v in begun[part].items() if k != other}, same)
        chex.assert_trees_all_equal(begun[part][other], PARAMS[part][other])
    chex.assert_trees_all_equal(stage(tokens=tokens).begin(PARAMS), PARAMS)


def test_it_says_what_it_cannot_begin_with():
    with pytest.raises(ValueError, match="there is none; train one before .* --no-from-prior"):
        stage(from_prior=True).begin(PARAMS)
    deeper = dataclasses.replace(CONFIG, depth=CONFIG.depth + 1)
    with pytest.raises(ValueError, match=r"of the same sizes .* depth=3"):
        stage(tokens=tiny.model(), model=deeper, from_prior=True).begin(PARAMS)


def test_each_order_ranks_as_its_name_says(key):
    nats, errors = jnp.array([[3.0, 1.0, 2.0, 1.0]]), jnp.array([[-7.0, -9.0, 0.5, -8.0]])

    def ranked(order):
        return ranks(order_scores(order, key, nats, errors)).tolist()

    assert ranked("dynamic") == [[3, 0, 2, 1]]  # the easiest first; equal ones in raster order
    assert ranked("certain") == [[2, 0, 3, 1]]
    assert ranked("uncertain") == [[1, 3, 0, 2]]
    assert ranked("raster") == [[0, 1, 2, 3]]
    assert sorted(ranked("random")[0]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match='the order "certain" needs the errors of the codes'):
        order_scores("certain", key, nats)


def test_centre_goes_outwards_in_rings():
    rank = ranks(order_scores("centre", jax.random.key(0), jnp.zeros((1, 16))))
    assert rank.reshape(4, 4).tolist() == [
        [4, 5, 6, 7],
        [8, 0, 1, 9],
        [10, 2, 3, 11],
        [12, 13, 14, 15],
    ]


@pytest.fixture(scope="module")
def shown():
    """What the model is shown of CODES in raster order, by twelve keys: [36, 16]."""
    s = stage(order="raster", greatest_noise=0.9)

    @jax.jit
    def look(params, keys):
        batch = {"text": jnp.asarray(TEXT), "codes": jnp.asarray(CODES)}
        return jax.vmap(lambda key: s.shown(params, batch, key))(keys)

    found = look(PARAMS, jax.random.split(jax.random.key(0), 12))
    return [np.asarray(x).reshape(36, 16) for x in found]


def test_partial_pictures_are_nested_and_hold_as_many_cells_as_the_schedule(shown):
    after = filled(16, 4, "linear").tolist()
    found = set()
    for cells, now in zip(*shown, strict=True):
        held, then = int((cells < K).sum()), int(now.sum())
        found.add((held, then))
        # in raster order S_k is the first cells, and so each S_k holds the one before
        assert (cells[:held] < K).all()
        assert (now == (np.arange(16) < then)).all()
    assert found == set(zip([0, *after], after, strict=False))


def test_some_of_the_filled_cells_are_wrong(shown):
    cells, _ = shown
    wrong = (cells < K) & (cells != np.tile(CODES.reshape(3, 16), (12, 1)))
    share = wrong.sum(1) / np.maximum((cells < K).sum(1), 1)
    assert 0.2 < wrong.sum() / (cells < K).sum() < 0.6  # 0.45, less those that are right by chance
    assert share.min() == 0
    assert share.max() > 0.6


def test_a_stage_a_cell_in_raster_order_factorises_as_the_autoregressive_prior(key):
    """The chances of all grids, code after code given those before, sum to 1."""
    config = dataclasses.replace(CONFIG, grid=2, codes=2)
    s = stage(model=config, order="raster", stages=4, greatest_noise=0.0)
    grids = np.array(list(itertools.product((0, 1), repeat=4)), np.int32)  # 16 4
    prefixes = np.where(np.arange(4) < np.arange(4)[:, None], grids[:, None], config.codes)
    text = np.zeros((64, config.text_length - 1), np.int32)
    shapes = jax.eval_shape(partial(draw_params, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)

    @jax.jit
    def look(params, text, prefixes, keys):
        logits, _ = Prior(config).apply({"params": params}, text, prefixes, method="predict")
        batch = {"text": text[:16], "codes": grids.reshape(16, 2, 2)}
        return jax.nn.log_softmax(logits), jax.vmap(lambda k: s.shown(params, batch, k))(keys)

    def in_rows(x):
        return np.asarray(x).reshape(-1, 4)

    keys = jax.random.split(key, 8)
    log_p, (cells, now) = look(params, text, prefixes.reshape(64, 4), keys)
    log_p = np.asarray(log_p).reshape(16, 4, 4, 2)
    chances = [
        sum(log_p[i, place, place, code] for place, code in enumerate(grid))
        for i, grid in enumerate(grids)
    ]
    np.testing.assert_allclose(np.exp(chances).sum(), 1, rtol=1e-5)
    # and training shows just such prefixes, and asks for the next code
    for i, partly, asked in zip(
        np.tile(np.arange(16), 8), *map(in_rows, (cells, now)), strict=True
    ):
        place = int((partly < config.codes).sum())
        np.testing.assert_array_equal(partly, prefixes[i, place])
        assert (asked == (np.arange(4) <= place)).all()


def test_evaluation_counts_what_revision_would_mend():
    codes = np.where(CODES < 8, 0, CODES)
    s = stage([{"text": TEXT, "codes": codes}])
    fresh = s.evaluate(PARAMS)  # every code is as likely as any other: nothing is doubtful
    assert (fresh["repaired"], fresh["damaged"]) == (0, 0)
    assert fresh["new_nats"] == pytest.approx(np.log(K), rel=1e-5)
    # a model that says code 0, loudly, whatever it sees
    stubborn = jax.tree.map(np.copy, PARAMS)
    stubborn["head"]["norm"]["bias"][0] = 1
    stubborn["head"]["image"]["kernel"][0, 0] = 9
    mended = s.evaluate(stubborn)
    assert mended["damaged"] == pytest.approx((codes != 0).mean(), abs=0.1)
    assert mended["repaired"] == pytest.approx((codes == 0).mean(), abs=0.35)  # of few


def test_the_model_draws_and_keeps_the_top_of_a_picture():
    s = stage()
    model = s.to_model(PARAMS)
    assert list(model.priors) == ["progressive"]
    drawn = model.generate("red apple", seed=1, stages=4)
    other = model.generate(
        "red apple", seed=2, stages=4, image_prompt=drawn[0, 0], keep_rows=2, decoder="progressive"
    )
    chex.assert_equal_shape([drawn, other])
    assert (drawn != other).any()


def test_a_model_with_both_priors_draws_with_the_progressive_one():
    model = tiny.model(**tiny.progressive_parts())
    drawn = [model.generate("red apple", stages=4, decoder=d) for d in (None, "progressive")]
    chex.assert_trees_all_equal(*drawn)


def test_what_a_decoder_cannot_do_is_said():
    with pytest.raises(ValueError, match="has no progressive prior; its decoder is autoregressive"):
        tiny.model().generate("red apple", decoder="progressive")
    with pytest.raises(ValueError, match="stages is 4 .* but only the progressive decoder has"):
        tiny.model().generate("red apple", stages=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(CONFIG, style="autoregressive")}, "has to be 'progressive'"),
        ({"model": CONFIG, "stages": 17}, r"stages is 17, but must lie in 1\.\.16"),
        ({"model": CONFIG, "greatest_noise": 1.0}, r"greatest_noise is 1.0, but has to be in"),
    ],
)
def test_bad_settings_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveRun(**changes)
