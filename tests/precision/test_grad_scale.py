"""Gradient scales against float32 gradients, and their controller against sequences by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.precision import grad_scale
from dalle_jax.precision.grad_scale import ScaleConfig, enter, leave, unscale

L, B, D, F = 4, 16, 32, 64
TINY = 1e-9  # float16 holds nothing below 6e-8
PARAMS = {
    name: np.random.default_rng(seed).normal(0, shape[1] ** -0.5, shape).astype(np.float32)
    for seed, (name, shape) in enumerate({"in": (L, D, F), "out": (L, F, D)}.items())
} | {"norm": np.ones((L, D), np.float32)}
X, DY = np.random.default_rng(7).normal(size=(2, B, D)).astype(np.float32)


def branch(weights, x, dtype):
    """Norm in float32, then two matrix products in the given type, as a resblock has them."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weights["norm"][None]
    hidden = jax.nn.sigmoid(x.astype(dtype) @ weights["in"].astype(dtype))
    return (hidden @ weights["out"].astype(dtype)).astype(jnp.float32)


def plain_block(x, weights, scale, dtype):
    del scale
    return x + branch(weights, x, dtype)


def scaled_block(x, weights, scale, dtype):
    return x + leave(branch(weights, enter(x, scale), dtype), scale)


def unrolled(block, x, params, scales):
    for i in range(L):
        x = block(x, jax.tree.map(lambda w, i=i: w[i], params), scales[i])
    return x


def scanned(block, x, params, scales):
    """As a deep model has it: one block compiled once, recomputed in the backward pass."""
    block = jax.checkpoint(block, prevent_cse=False)
    return jax.lax.scan(lambda x, ws: (block(x, *ws), None), x, (params, scales))[0]


def gradients(block, scales, dy, *, dtype=jnp.float16, through=scanned):
    """Gradients for the parameters and for x of a stack of blocks, given that of its output."""
    return _gradients(through, block, dtype, PARAMS, X, jnp.asarray(scales, jnp.float32), dy)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(through, block, dtype, params, x, scales, dy):
    def run(params, x):
        return through(partial(block, dtype=dtype), x, params, scales)

    return jax.vjp(run, params, x)[1](dy)


def error(got, true):
    """Norm of the difference of two arrays, relative to the second."""
    return float(np.linalg.norm(np.asarray(got) - true) / np.linalg.norm(true))


def test_forward_is_the_identity_to_the_bit():
    x = np.array([1.5, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], np.float32)
    for function in (enter, leave):
        same = jax.jit(function)(jnp.asarray(x), jnp.float32(3.0))
        np.testing.assert_array_equal(np.asarray(same).view(np.int32), x.view(np.int32))


@pytest.mark.parametrize(
    ("function", "expected"),
    [(leave, [8.0, -16.0, 0, 0, 0]), (enter, [0.125, -0.25, 0, 0, 2.0**122])],
)
def test_backward_scales_and_filters_as_written_out(function, expected):
    @jax.jit
    def backward(x, scale, dy):
        return jax.vjp(function, x, scale)[1](dy)

    dy = jnp.array([1.0, -2.0, np.inf, np.nan, 2.0**125])  # 8 times the last is infinite
    dx, dscale = backward(jnp.ones(5), jnp.float32(8.0), dy)
    np.testing.assert_array_equal(dx, expected)
    assert float(dscale) == 0


def test_float16_loses_tiny_gradients_and_scales_keep_them():
    dy = TINY * DY
    true, true_dx = gradients(plain_block, np.ones(L), dy, dtype=jnp.float32)
    lost, lost_dx = gradients(plain_block, np.ones(L), dy)
    scales = 2.0 ** np.array([27, 26, 25, 27])
    kept, kept_dx = gradients(scaled_block, scales, dy)
    kept, finite = jax.jit(unscale)(kept, jnp.asarray(scales, jnp.float32))

    assert finite.tolist() == [True] * L
    for name, gradient in true.items():
        assert not np.any(lost[name])
        assert error(kept[name], gradient) < 1e-3
    # less the identity path, which is float32 anyway: what the branches add to the gradient of x
    np.testing.assert_array_equal(lost_dx, dy)
    assert error(kept_dx - dy, true_dx - dy) < 1e-3


def test_scan_with_recomputation_equals_the_unrolled_stack():
    scales = 2.0 ** np.array([27, 26, 25, 27])
    looped, looped_dx = gradients(scaled_block, scales, TINY * DY)
    expected, expected_dx = gradients(scaled_block, scales, TINY * DY, through=unrolled)
    assert error(looped_dx, expected_dx) < 1e-3
    assert max(error(looped[name], expected[name]) for name in expected) < 1e-3


def test_a_branch_that_overflows_does_not_reach_the_blocks_before_it():
    overflows = 2
    scales = np.array([1.0, 1.0, 2.0**30, 1.0])
    params, dx = gradients(scaled_block, scales, DY)
    _, finite = jax.jit(unscale)(params, jnp.asarray(scales, jnp.float32))
    assert finite.tolist() == [True, True, False, True]

    def without(block, x, params, scales):
        for i in range(L):
            weights = jax.tree.map(lambda w, i=i: w[i], params)
            if i == overflows:
                x = x + jax.lax.stop_gradient(branch(weights, x, jnp.float16))
            else:
                x = block(x, weights, scales[i])
        return x

    expected, expected_dx = gradients(scaled_block, np.ones(L), DY, through=without)
    assert error(dx, expected_dx) < 1e-3
    for name in params:
        assert error(params[name][:overflows], expected[name][:overflows]) < 1e-3


def test_identity_path_is_exact_where_the_branch_overflows():
    @jax.jit
    def backward(x, dy):
        weights = {name: jnp.asarray(w[0]) for name, w in PARAMS.items()}
        block = partial(scaled_block, weights=weights, scale=jnp.float32(2.0**30))
        return jax.vjp(partial(block, dtype=jnp.float16), x)[1](dy)[0]

    np.testing.assert_array_equal(backward(X, DY), DY)


def test_unscale_divides_each_layer_by_its_own_scale():
    grads = {
        "norm": {"scale": jnp.array([[2.0, 4.0], [8.0, np.nan]])},
        "linear": {"kernel": jnp.array([[[2.0]], [[4.0]]], jnp.float16)},
    }
    divided, finite = unscale(grads, jnp.array([2.0, 4.0]))
    expected = {
        "norm": {"scale": jnp.array([[1.0, 2.0], [2.0, np.nan]])},
        "linear": {"kernel": jnp.array([[[1.0]], [[1.0]]])},
    }
    chex.assert_trees_all_equal(divided, expected)
    chex.assert_trees_all_equal_dtypes(divided, expected)
    assert finite.tolist() == [True, False]


def test_finite_is_judged_before_the_division():
    small = jnp.array([[3e38], [3e38]])
    divided, finite = unscale({"w": small}, jnp.array([0.5, 2.0]))
    assert np.isinf(divided["w"][0, 0])
    assert finite.tolist() == [True, True]


def test_unscale_refuses_a_leaf_that_is_not_stacked_by_layers():
    with pytest.raises(ValueError, match=r"gradient of \['w'\] has shape \(3, 2\).*are 2 scales"):
        unscale({"w": jnp.ones((3, 2))}, jnp.ones(2))


def test_controller_follows_a_sequence_written_out():
    config = ScaleConfig(
        init_scale=8.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        backoff_interval=2,
        min_scale=2.0,
        max_scale=32.0,
    )
    sequence = [  # finite, then the scale and the updates since a division after it
        (True, 16, 3),
        (False, 8, 0),
        (False, 8, 1),  # within the window of two updates
        (False, 8, 2),
        (False, 4, 0),
        (True, 8, 1),
        (False, 8, 2),  # neither grows nor is divided
        (False, 4, 0),
        (True, 8, 1),
        (True, 16, 2),
        (True, 32, 3),
        (True, 32, 4),  # the greatest
    ]
    state = grad_scale.create(config, (), replicas=1)
    assert (float(state.scale), int(state.since)) == (8, 2)
    move = jax.jit(partial(grad_scale.update, config=config, replicas=1))
    for finite, scale, since in sequence:
        state = move(state, jnp.array(finite))
        assert (float(state.scale), int(state.since)) == (scale, since)


def test_blocks_move_on_their_own_and_stop_at_the_least_scale():
    config = ScaleConfig(
        init_scale=8.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        backoff_interval=0,
        min_scale=2.0,
        max_scale=32.0,
    )
    state = grad_scale.create(config, (2, 3), replicas=4)
    move = jax.jit(partial(grad_scale.update, config=config, replicas=4))
    flags = jnp.array([[True, False, True], [False, True, False]])
    for scale in ([[64, 16, 64], [16, 64, 16]], [[128, 8, 128], [8, 128, 8]]):
        state = move(state, flags)
        np.testing.assert_array_equal(state.scale, scale)
    np.testing.assert_array_equal(move(state, flags).scale, [[128, 8, 128], [8, 128, 8]])
    assert state.scale.dtype == jnp.float32
    assert state.since.dtype == jnp.int32


def test_published_numbers():
    config = ScaleConfig()
    state = grad_scale.create(config, (1,), replicas=1024)
    assert float(state.scale[0]) == 2.0**23

    @partial(jax.jit, static_argnums=2)
    def after(state, finite, updates):
        def step(state, _):
            return grad_scale.update(state, finite, config=config, replicas=1024), None

        return jax.lax.scan(step, state, length=updates)[0]

    finite, broken = jnp.array([True]), jnp.array([False])
    np.testing.assert_allclose(after(state, finite, 1000).scale, 2.0**24, rtol=2e-4)
    # divided at the first update and at the 127th
    np.testing.assert_allclose(after(state, broken, 126).scale, 2.0**22.5, rtol=1e-6)
    np.testing.assert_allclose(after(state, broken, 127).scale, 2.0**22, rtol=1e-6)
    assert float(after(state, finite, 20000).scale[0]) == 2.0**34
    assert float(after(state, broken, 20000).scale[0]) == 2.0**17


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init_scale": 2.0**25}, "min_scale, init_scale and max_scale are .* in rising order"),
        ({"min_scale": 0.0}, "must be positive"),
        ({"growth_factor": 0.5}, "growth_factor is 0.5, but must be at least 1"),
        ({"backoff_factor": 1.0}, "backoff_factor is 1.0, but must lie between 0 and 1"),
        ({"backoff_interval": -1}, "backoff_interval is -1, but must be at least 0"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ScaleConfig(**wrong)


def test_wrong_replicas_and_flags_are_refused():
    config = ScaleConfig()
    with pytest.raises(ValueError, match="replicas is 0, but must be at least 1"):
        grad_scale.create(config, (2,), replicas=0)
    state = grad_scale.create(config, (2, 2), replicas=1)
    with pytest.raises(ValueError, match="one flag for each resblock"):
        grad_scale.update(state, jnp.ones(2, bool), config=config, replicas=1)
