"""Muon against optax's own and against what it promises for single matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.optim.muon import Muon, MuonOptions
from dalle_jax.optim.optimizer import adamw

SHAPES = {"qkv": (2, 4, 3, 2, 2), "attention_out": (2, 2, 2, 4), "bias": (4,), "table": (5, 4)}
AXES = {"qkv": ((1,), (3, 4)), "attention_out": ((1, 2), (3,)), "bias": None, "table": None}


def draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def matrices(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: AXES[path[0].key], params)


def optimizer(muon=True, *, learning_rate=0.1, weight_decay=0.0, **options):
    muon = Muon(scale=5.0, matrices=matrices) if muon else None
    schedule = optax.constant_schedule(learning_rate)
    return adamw(schedule, b2=0.96, weight_decay=weight_decay, muon=muon, **options)


def moved(transform, steps=3, grads=draw):
    params = draw(9)
    state = transform.init(params)

    @jax.jit
    def update(grads, state):
        return transform.update(grads, state, params, value=1.0)

    for i in range(steps):
        updates, state = update(grads(i), state)
    return updates


def test_matrices_move_as_with_optaxs_muon():
    dimensions = {
        name: {"kernel": axes and optax.contrib.MuonDimensionNumbers(*axes)}
        for name, axes in AXES.items()
    }
    optaxs = optax.contrib.muon(0.5, muon_weight_dimension_numbers=dimensions)
    expected = moved(optax.with_extra_args_support(optaxs))
    ours = moved(optimizer())
    for name in ("qkv", "attention_out"):
        chex.assert_trees_all_close(ours[name], expected[name], rtol=1e-5)


def test_everything_else_moves_as_without_muon():
    with_muon, without = moved(optimizer()), moved(optimizer(muon=False))
    for name in ("bias", "table"):
        chex.assert_trees_all_close(with_muon[name], without[name], rtol=1e-6)


def test_each_matrix_becomes_orthogonal_by_itself():
    updates = moved(optimizer(learning_rate=1 / 5), steps=1)["qkv"]["kernel"]
    for query_key_or_value in (
        np.asarray(updates.reshape(2, 4, 3, 4)).swapaxes(1, 2).reshape(6, 4, 4)
    ):
        values = np.linalg.svd(query_key_or_value, compute_uv=False)
        assert values.max() < 1.3
        assert np.median(values) > 0.6  # five steps leave the smallest of them behind

    def louder(i):  # one layer's queries say nothing about the rest
        grads = draw(i)
        grads["qkv"]["kernel"] = grads["qkv"]["kernel"].at[0, :, 0].multiply(1000)
        return grads

    same = moved(optimizer(learning_rate=1 / 5), steps=1, grads=louder)["qkv"]["kernel"]
    np.testing.assert_allclose(same, updates, rtol=1e-4, atol=1e-5)


def test_wide_matrices_move_further_by_the_root_of_outputs_per_input():
    wide = {"wide": {"kernel": jnp.eye(2, 8)}}  # orthogonal already
    muon = Muon(scale=5.0, matrices=lambda params: {"wide": {"kernel": ((0,), (1,))}})
    transform = adamw(optax.constant_schedule(0.1), b2=0.9, weight_decay=0.0, muon=muon)
    updates, _ = transform.update(wide, transform.init(wide), wide, value=1.0)
    values = np.linalg.svd(updates["wide"]["kernel"], compute_uv=False)
    np.testing.assert_allclose(values, 0.1 * 5 * 2, rtol=0.35)  # orthogonal but for 0.65 to 1.35


def test_decay_of_matrices_is_adamws():
    def nothing(_):
        return jax.tree.map(jnp.zeros_like, draw(0))

    updates = moved(optimizer(weight_decay=0.5), grads=nothing)
    np.testing.assert_allclose(
        updates["qkv"]["kernel"], -0.05 * draw(9)["qkv"]["kernel"], rtol=1e-6
    )


def test_gradients_are_clipped_together_before_momentum():
    transform = optimizer(grad_clip_norm=4.0)
    params, grads = draw(9), draw(0)
    _, state = transform.update(grads, transform.init(params), params, value=1.0)
    scale = 4.0 / optax.global_norm(grads)
    assert scale < 1
    (mu,) = (s.mu for s in jax.tree.leaves(state, is_leaf=is_muon) if is_muon(s))
    np.testing.assert_allclose(
        mu["qkv"]["kernel"], 0.05 * scale * grads["qkv"]["kernel"], rtol=1e-5
    )


def is_muon(state):
    return isinstance(state, optax.contrib.MuonState)


def test_a_plateau_halves_muons_steps_too():
    steps = moved(optimizer(plateau_steps=1), steps=12, grads=lambda _: draw(0))
    before = moved(optimizer(), steps=12, grads=lambda _: draw(0))
    ratio = steps["qkv"]["kernel"] / before["qkv"]["kernel"]
    np.testing.assert_allclose(ratio, 0.25, rtol=1e-5)


def test_options_name_what_is_allowed():
    assert MuonOptions().muon(1e-3, matrices) is None
    assert MuonOptions(optimizer="muon").muon(2e-3, matrices).scale == pytest.approx(5.0)
    with pytest.raises(ValueError, match="muon_learning_rate is 0.0, but has to be positive"):
        MuonOptions(optimizer="muon", muon_learning_rate=0.0).muon(2e-3, matrices)
