import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.autoregressive_prior import AutoregressivePrior, init_params
from dalle_jax.models.masks import attention_mask, layer_kinds
from dalle_jax.models.prior_config import PUBLISHED, PriorConfig

# four layers hold every kind: row, column, row, conv
TINY = PriorConfig(
    width=16, depth=4, heads=2, text_vocabulary=11, text_length=4, grid=3, codes=7, kernel=3
)


@cache
def _parameters(config):
    """Weights large enough for every path to show in float32."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * generator.normal(size=x.shape), x.dtype), shapes
    )


def _batch(config, size):
    generator = np.random.default_rng(size)
    text = generator.integers(config.text_vocabulary, size=(size, config.text_length - 1))
    codes = generator.integers(config.codes, size=(size, config.image_length))
    return jnp.asarray(text), jnp.asarray(codes)


@partial(jax.jit, static_argnames="config")
def _apply(config, params, text, codes, cells=None):
    return AutoregressivePrior(config).apply({"params": params}, text, codes, cells=cells)


def _forward(config, text, codes):
    return _apply(config, _parameters(config), text, codes)


def _decode(config, text, codes):
    """Logits of all image positions, one cached step after the other."""

    @jax.jit
    def steps(params, text, codes):
        prior = AutoregressivePrior(config).bind({"params": params})
        caches = prior.prefill(text, samples=len(codes) // len(text))
        decode = prior.decode_step()

        def step(caches, inputs):
            logits, caches = decode(caches, *inputs)
            return caches, logits

        previous = jnp.roll(codes, 1, axis=1).T  # position 0 ignores what comes with it
        _, logits = jax.lax.scan(step, caches, (previous, jnp.arange(config.image_length)))
        return logits.swapaxes(0, 1)

    return steps(_parameters(config), text, codes)


@pytest.mark.parametrize(
    ("size", "layers", "everything"),
    [
        ("2.8B", 2_832_752_640, 2_928_234_240),
        ("5.6B", 5_551_300_608, 5_684_974_848),
        ("12B", 12_095_479_808, 12_292_808_448),
    ],
)
def test_published_sizes_count_the_parameters_of_their_layers(size, layers, everything):
    config = PUBLISHED[size]
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert count["layers"] == layers
    assert sum(count.values()) == everything
    # the paper rounds to 0.1e9, which is 1.8 % of the smallest size
    assert layers == pytest.approx(float(size.rstrip("B")) * 1e9, rel=0.012)
    if size == "12B":
        assert layers == pytest.approx(12.0e9, rel=0.01)


def test_initial_parameters_are_stacked_and_spread_as_documented():
    config = dataclasses.replace(TINY, width=64, heads=4)
    params = jax.jit(partial(init_params, config))(jax.random.key(3))
    L, D = config.depth, config.width
    assert all(x.shape[0] == L for x in jax.tree.leaves(params["layers"]))
    residual = (2 * L) ** -0.5
    for name, std in {
        "qkv": 0.125 * D**-0.5,
        "attention_out": 0.125 * D**-0.5 * residual,
        "mlp_in": 0.125 * D**-0.5,
        "mlp_out": 0.125 * (4 * D) ** -0.5 * residual,
    }.items():
        assert params["layers"][name]["kernel"].std() == pytest.approx(std, rel=0.02)
        assert not params["layers"][name]["bias"].any()
    for name in ("text", "slot", "pad", "code", "row", "column", "start_of_text"):
        assert params["embed"][name].std() == pytest.approx(0.125 * D**-0.5, rel=0.25)
    # zero heads: an untrained prior finds every token equally likely
    assert not params["head"]["text"]["kernel"].any()
    assert not params["head"]["image"]["kernel"].any()


@pytest.mark.parametrize("size", [1, 3])
def test_cached_decode_equals_full_forward(size):
    text, codes = _batch(TINY, size)
    text = text.at[0, 1:].set(TINY.text_vocabulary + jnp.arange(1, 3))  # a short caption
    _, expected = _forward(TINY, text, codes)
    logits = _decode(TINY, text, codes)
    assert expected.std() > 0.1
    chex.assert_trees_all_close(logits, expected, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_cached_decode_equals_full_forward_when_the_kernel_exceeds_the_grid(grid):
    config = dataclasses.replace(TINY, depth=3, grid=grid, kernel=11, text_length=2)
    text, codes = _batch(config, 2)
    _, expected = _forward(config, text, codes)
    chex.assert_trees_all_close(_decode(config, text, codes), expected, atol=1e-5)


def test_samples_of_a_prompt_share_its_text():
    text, codes = _batch(TINY, 6)
    _, expected = _forward(TINY, text[:2].repeat(3, axis=0), codes)
    chex.assert_trees_all_close(_decode(TINY, text[:2], codes), expected, atol=1e-5)


def test_a_decode_step_sums_products_of_bfloat16_in_float32():
    prior = AutoregressivePrior(TINY, dtype=jnp.bfloat16).bind({"params": _parameters(TINY)})
    text, codes = _batch(TINY, 2)
    caches = jax.eval_shape(prior.prefill, text)
    program = jax.make_jaxpr(prior.decode_step())(caches, codes[:, 0], jnp.int32(0))
    products = [x for x in program.eqns if x.primitive.name == "dot_general"]
    half = [x for x in products if x.invars[0].aval.dtype == jnp.bfloat16]
    assert len(half) >= 4 * TINY.depth
    assert {x.outvars[0].aval.dtype for x in half} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_cached_decode_equals_full_forward_with_dense_layers(order):
    config = dataclasses.replace(TINY, depth=2, attention="dense", order=order)
    text, codes = _batch(config, 2)
    _, expected = _forward(config, text, codes)
    assert config.kinds == ("dense", "dense")
    chex.assert_trees_all_close(_decode(config, text, codes), expected, atol=1e-5)


ANNEALED = dataclasses.replace(TINY, depth=2, attention="dense", order="annealed")


def _ordered(codes, cells):
    """Image logits of a prior that was shown some codes of a grid in the order of the cells."""
    text, _ = _batch(ANNEALED, 1)
    cells = jnp.asarray(cells)[None]
    shown = jnp.take_along_axis(jnp.asarray(codes)[None], cells, axis=1)
    return np.asarray(_apply(ANNEALED, _parameters(ANNEALED), text, shown, cells)[1])[0]


def test_without_an_order_of_the_cells_it_is_raster_order():
    text, codes = _batch(ANNEALED, 1)
    found = _forward(ANNEALED, text, codes)[1][0]
    chex.assert_trees_all_close(_ordered(codes[0], np.arange(9)), found, atol=1e-5)


def test_inputs_that_say_where_their_code_lies_are_all_that_an_order_adds():
    text, codes = _batch(ANNEALED, 2)
    params, plain = _parameters(ANNEALED), dataclasses.replace(ANNEALED, order="raster")
    own = {name: params["embed"][name] for name in ("own_row", "own_column")}
    rest = {name: table for name, table in params["embed"].items() if name not in own}
    wanted = _apply(plain, params | {"embed": rest}, text, codes)
    nowhere = params | {"embed": params["embed"] | jax.tree.map(jnp.zeros_like, own)}
    chex.assert_trees_all_close(_apply(ANNEALED, nowhere, text, codes), wanted, atol=1e-5)
    assert np.abs(_apply(ANNEALED, params, text, codes)[1] - wanted[1]).max() > 1e-2


def test_in_any_order_a_code_follows_from_those_before_it_and_from_its_cell():
    order = np.array([5, 0, 7, 3, 1, 2, 4, 6, 8])
    codes = np.array([1, 2, 3, 4, 5, 6, 0, 1, 2])
    first = _ordered(codes, order)[2]
    for cell, seen in ((5, True), (0, True), (7, False), (3, False), (8, False)):
        other = codes.copy()
        other[cell] = (codes[cell] + 1) % 7
        assert np.allclose(_ordered(other, order)[2], first, atol=1e-5) != seen, cell
    another = order.copy()
    another[[2, 3]] = 3, 7  # another cell is asked for
    assert np.abs(_ordered(codes, another)[2] - first).max() > 1e-3
    codes[[5, 0]] = 4
    another = order.copy()
    another[[0, 1]] = 0, 5  # the same codes, at each other's cells
    assert np.abs(_ordered(codes, another)[2] - _ordered(codes, order)[2]).max() > 1e-3


def test_an_order_is_refused_where_it_means_nothing():
    text, codes = _batch(TINY, 1)
    with pytest.raises(ValueError, match="a prior with order raster predicts them row by row"):
        AutoregressivePrior(TINY).apply(
            {"params": _parameters(TINY)}, text, codes, cells=jnp.arange(9)[None]
        )
    with pytest.raises(ValueError, match="order annealed needs attention dense, but it is sparse"):
        dataclasses.replace(TINY, order="annealed")


def _influence(config):
    """Whether the logits of one position (first axis) change with the input of another (second).

    All slots are pads and all codes differ, so that each input has an embedding vector of its own.
    """
    config = dataclasses.replace(config, codes=config.image_length)
    V, length = config.text_vocabulary, config.image_length
    text = V + jnp.arange(config.text_length - 1)[None]
    codes = jnp.arange(length)[None]
    params = _parameters(config)
    inputs = {name: params["embed"][name] for name in ("start_of_text", "pad", "start_of_image")}
    inputs["code"] = params["embed"]["code"][: length - 1]
    last = params["embed"]["code"][length - 1 :]  # only predicted, never read

    def outputs(inputs):
        embed = params["embed"] | inputs | {"code": jnp.concatenate([inputs["code"], last])}
        variables = {"params": params | {"embed": embed}}
        text_logits, image_logits = AutoregressivePrior(config).apply(variables, text, codes)
        return jnp.concatenate([text_logits[0] @ probe[:V], image_logits[0] @ probe[V:]])

    probe = jax.random.normal(jax.random.key(5), (V + length,))
    slopes = jax.jit(jax.jacrev(outputs))(inputs)
    strength = [
        np.abs(slopes[name]).sum(-1).reshape(config.length - 1, -1)
        for name in ("start_of_text", "pad", "start_of_image", "code")
    ]
    return np.concatenate(strength, axis=1) > 0


def _reachable(config):
    """What the masks allow: one step a layer, along the product of their graphs."""
    reach = np.eye(config.length, dtype=bool)
    for kind in layer_kinds(config.depth):
        sizes = {"text_length": config.text_length, "grid": config.grid, "kernel": config.kernel}
        reach = attention_mask(kind, **sizes) @ reach
    return np.delete(reach, config.text_length - 1, axis=0)  # that position predicts nothing


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_one_layer_passes_exactly_what_its_mask_shows(kind, monkeypatch):
    config = dataclasses.replace(TINY, depth=1, grid=4)
    monkeypatch.setattr("dalle_jax.models.prior_config.layer_kinds", lambda depth: (kind,) * depth)
    monkeypatch.setitem(globals(), "layer_kinds", lambda depth: (kind,) * depth)
    np.testing.assert_array_equal(_influence(config), _reachable(config))


def test_the_whole_model_leaks_nothing_and_reaches_what_its_masks_allow():
    config = dataclasses.replace(TINY, depth=3, grid=4)  # row, column, conv
    influence = _influence(config)
    causal = np.delete(np.tri(config.length, dtype=bool), config.text_length - 1, axis=0)
    assert not influence[~causal].any()
    np.testing.assert_array_equal(influence, _reachable(config))


def test_logits_do_not_depend_on_later_text_or_codes():
    text, codes = _batch(TINY, 1)
    before = _forward(TINY, text, codes)
    text_after, _ = _forward(TINY, text.at[0, 1].add(1), codes)
    chex.assert_trees_all_equal(text_after[:, :2], before[0][:, :2])
    assert (text_after[:, 2] != before[0][:, 2]).any()
    _, image_after = _forward(TINY, text, (codes.at[0, 4].add(1)) % TINY.codes)
    chex.assert_trees_all_equal(image_after[:, :5], before[1][:, :5])
    assert (image_after[:, 5] != before[1][:, 5]).any()


@pytest.mark.parametrize("slot", range(TINY.text_length - 1))
def test_each_slot_has_a_pad_of_its_own_that_only_an_empty_slot_shows(slot):
    text, codes = _batch(TINY, 1)
    pads = TINY.text_vocabulary + jnp.arange(TINY.text_length - 1)[None]
    params = _parameters(TINY)
    pad = params["embed"]["pad"].at[slot, 0].add(1.0)
    changed = params | {"embed": params["embed"] | {"pad": pad}}
    _, before = _forward(TINY, pads, codes)
    _, after = _apply(TINY, changed, pads, codes)
    assert jnp.abs(after - before).max() > 1e-3
    chex.assert_trees_all_equal(_apply(TINY, changed, text, codes), _forward(TINY, text, codes))


def test_samples_of_a_batch_do_not_see_each_other():
    text, codes = _batch(TINY, 3)
    whole = _forward(TINY, text, codes)
    alone = _forward(TINY, text[1:2], codes[1:2])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1:2], whole), alone, atol=1e-5)


@cache
def _loss_and_gradients(**options):
    config = dataclasses.replace(TINY, depth=3, attention="dense")
    prior, (text, codes) = AutoregressivePrior(config, **options), _batch(config, 2)

    @jax.jit
    def of(params, text, codes):
        def loss(params):
            text_logits, image_logits = prior.apply({"params": params}, text, codes)
            return jnp.square(text_logits).mean() + jnp.square(image_logits).mean()

        return jax.value_and_grad(loss)(params)

    return of(_parameters(config), text, codes)


@pytest.mark.parametrize("options", [{"remat": True}, {"scan": True, "remat": True}])
def test_scanned_and_rematerialised_layers_have_the_gradients_of_a_plain_stack(options):
    got, expected = _loss_and_gradients(**options), _loss_and_gradients()
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_scanned_periods_keep_the_order_of_the_layers():
    config = dataclasses.replace(TINY, depth=9)  # two periods and one more
    text, codes = _batch(config, 2)
    variables = {"params": _parameters(config)}
    got = jax.jit(AutoregressivePrior(config, scan=True).apply)(variables, text, codes)
    chex.assert_trees_all_close(got, _forward(config, text, codes), rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_gradients_and_logits_in_float32():
    text, codes = _batch(TINY, 2)
    prior = AutoregressivePrior(TINY, dtype=jnp.bfloat16)

    @jax.jit
    def loss(params):
        logits = prior.apply({"params": params}, text, codes)
        return jnp.square(logits[1]).mean(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(_parameters(TINY))
    expected = _forward(TINY, text, codes)
    chex.assert_trees_all_equal_dtypes(gradients, _parameters(TINY))
    for got, exact in zip(logits, expected, strict=True):
        assert got.dtype == jnp.float32
        error = jnp.abs(got - exact).max() / exact.std()
        assert 0 < error < 0.1  # 0: nothing would have been rounded


def test_bad_sizes_say_what_is_allowed():
    for change, message in [
        ({"width": 10, "heads": 4}, r"width \(=10\) must be a multiple of heads \(=4\)"),
        ({"depth": 0}, "depth is 0, but must be at least 1"),
        ({"text_length": 1}, "text_length is 1, but must be at least 2"),
        ({"kernel": 4}, "kernel is 4, but must be odd"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)


def test_wrong_lengths_say_what_the_config_needs():
    text, codes = _batch(TINY, 1)
    with pytest.raises(ValueError, match="got 2 caption slots, but text_length 4 needs 3"):
        _forward(TINY, text[:, :2], codes)
    with pytest.raises(ValueError, match="got 8 codes an image, but grid 3 needs 9"):
        _forward(TINY, text, codes[:, :8])
