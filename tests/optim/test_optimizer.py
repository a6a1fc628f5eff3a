"""The optimizer against optax's own and against numbers written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.optim.optimizer import adamw, decayed, scale_by_clipped_adam
from dalle_jax.precision.formats import decode, round_to


def run(transform, grads, params, steps=3, **extra):
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update(grads, state, params, **extra)
    return updates, state


def test_clipped_adam_with_a_high_bound_is_adam(key):
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    ours = run(scale_by_clipped_adam(0.9, 0.96, 1e-8, 1e9), grads, params)
    optaxs = run(optax.scale_by_adam(0.9, 0.96, 1e-8), grads, params)
    chex.assert_trees_all_close(ours, optaxs, rtol=1e-6)


def test_second_moment_never_exceeds_its_bound():
    grads = {"w": jnp.array([100.0, 1.0])}
    updates, state = run(scale_by_clipped_adam(0.9, 0.96, 1e-8, 5.0), grads, grads, steps=1)
    np.testing.assert_allclose(state.nu["w"], [5.0, 0.04], rtol=1e-6)
    # mean 100 over sqrt(5 / (1 - 0.96)) for the first, 1 over sqrt(1) for the second
    np.testing.assert_allclose(updates["w"], [100 / np.sqrt(125), 1.0], rtol=1e-5)


def test_only_kernels_decay():
    params = {"layer": {"kernel": 1, "bias": 1}, "embed": {"code": 1}, "norm": {"scale": 1}}
    assert decayed(params) == {
        "layer": {"kernel": True, "bias": False},
        "embed": {"code": False},
        "norm": {"scale": False},
    }


def test_decay_is_multiplied_by_the_step_size():
    params = {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
    grads = jax.tree.map(jnp.zeros_like, params)
    transform = adamw(optax.constant_schedule(0.1), b2=0.96, weight_decay=0.5)
    updates, _ = run(transform, grads, params, steps=1, value=1.0)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0)


def test_gradients_are_clipped_before_the_moments():
    params = {"kernel": jnp.zeros(2)}
    transform = adamw(optax.constant_schedule(0.1), b2=0.96, weight_decay=0.0, grad_clip_norm=4.0)
    _, state = run(transform, {"kernel": jnp.array([30.0, 40.0])}, params, steps=1, value=1.0)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["kernel"], [0.24, 0.32], rtol=1e-5)


def test_step_size_halves_on_a_plateau_five_times_at_most():
    params = {"kernel": jnp.zeros(1)}
    transform = adamw(optax.constant_schedule(1.0), b2=0.96, weight_decay=0.0, plateau_steps=2)
    state = transform.init(params)
    grads = {"kernel": jnp.ones(1)}

    @jax.jit
    def update(state):
        return transform.update(grads, state, params, value=jnp.float32(3.0))

    sizes = []
    for _ in range(80):
        updates, state = update(state)
        sizes.append(-float(updates["kernel"][0]))
    assert sizes[0] == pytest.approx(1.0, rel=1e-5)
    halvings = {round(np.log2(1 / size)) for size in sizes}
    assert halvings == {0, 1, 2, 3, 4, 5}


def test_moments_of_kernels_are_rounded_to_the_papers_formats_between_updates(key):
    shapes = {
        "layers": {"qkv": {"kernel": (4, 3), "bias": (3,)}},
        "head": {"image": {"kernel": (3, 2)}},
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    options = {"b2": 0.96, "weight_decay": 0.0, "max_second_moment": 5.0}
    transform = adamw(optax.constant_schedule(1.0), in_16_bits=True, **options)
    plain = adamw(optax.constant_schedule(1.0), **options)
    state, exact = transform.init(params), plain.init(params)
    mean, variance = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    for step in range(1, 4):
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        grads = jax.tree.unflatten(
            jax.tree.structure(params),
            [
                jax.random.normal(k, x.shape)
                for k, x in zip(keys, jax.tree.leaves(params), strict=True)
            ],
        )
        updates, state = transform.update(grads, state, params)
        reference, exact = plain.update(grads, exact, params)
        g = np.asarray(grads["layers"]["qkv"]["kernel"])
        mean, variance = 0.9 * mean + 0.1 * g, np.minimum(0.96 * variance + 0.04 * g**2, 5)
        expected = -(mean / (1 - 0.9**step)) / (np.sqrt(variance / (1 - 0.96**step)) + 1e-8)
        mean, variance = (
            np.asarray(round_to(jnp.asarray(x), f))
            for x, f in ((mean, "1-6-9"), (variance, "0-6-10"))
        )
        np.testing.assert_allclose(updates["layers"]["qkv"]["kernel"], expected, rtol=1e-5)
        stored = state[0].mu["layers"]["qkv"]["kernel"]
        assert stored.dtype == state[0].nu["layers"]["qkv"]["kernel"].dtype == jnp.uint16
        np.testing.assert_allclose(decode(stored, "1-6-9"), mean, atol=2e-4)  # a step of the format
        for path in (("layers", "qkv", "bias"), ("head", "image", "kernel")):
            ours, theirs = updates, reference
            for name in path:
                ours, theirs = ours[name], theirs[name]
            np.testing.assert_array_equal(ours, theirs)
    assert (updates["layers"]["qkv"]["kernel"] != reference["layers"]["qkv"]["kernel"]).any()
