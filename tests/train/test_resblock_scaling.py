"""float16 with a gradient scale for each resblock, in the update of the prior."""

import dataclasses

import chex
import eight
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.errors import UserError
from dalle_jax.models.autoregressive_prior import PriorConfig
from dalle_jax.train import state as state_lib
from dalle_jax.train.train_step import make_train_step

MODEL = PriorConfig(**eight.PRIOR, attention="dense")  # one kind of layer compiles in a third


def batch():
    return jax.tree.map(jnp.asarray, eight.batch("prior"))


@pytest.fixture(scope="module")
def trained():
    """A float16 stage, its update, and the state after one update."""
    stage = eight.stage("prior", model=MODEL, precision="float16", warmup_steps=0)
    state = jax.jit(lambda key: state_lib.init_state(stage, key))(jax.random.key(0))
    # On a CPU XLA leaves out conversions to float16 and back, and with them every overflow.
    update = (
        make_train_step(stage, ema_decay=0.5)
        .lower(state, batch())
        .compile(compiler_options={"xla_allow_excess_precision": False})
    )
    state, metrics = update(state, batch())
    assert metrics["skipped"] == 0
    return stage, update, state


def test_unscaled_gradients_are_those_of_float32(trained):
    stage, _, state = trained
    exact = eight.stage("prior", model=MODEL)
    expected = jax.jit(jax.grad(lambda p, b: exact.loss(p, b, None, None)[0]))(
        state.params, batch()
    )
    scales = state.scales.scale * jnp.array([[1.0, 2.0]])  # not the same for both branches

    @jax.jit
    def gradients(params, batch):
        grads = jax.grad(lambda p: stage.loss(p, batch, None, None, scales=scales)[0])(params)
        return stage.scaling.unscale(grads, state.scales.replace(scale=scales))

    grads, finite = gradients(state.params, batch())
    assert finite.shape == (eight.PRIOR["depth"], 2) and finite.all()
    chex.assert_trees_all_equal_dtypes(grads, expected)

    def difference(g, e):
        return np.linalg.norm(g - e) / max(np.linalg.norm(e), 1e-6)  # of pads there is none

    assert max(jax.tree.leaves(jax.tree.map(difference, grads, expected))) < 1e-2


def test_an_update_with_an_overflow_changes_nothing_but_the_scales(trained):
    _, update, state = trained
    scale = state.scales.scale.at[2, 1].set(2.0**60)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema_params))
    broken = dataclasses.replace(state, scales=state.scales.replace(scale=scale))
    after, metrics = update(jax.tree.map(jnp.copy, broken), batch())
    assert metrics["skipped"] == 1 and metrics["update_norm"] == 0 and metrics["grad_norm"] == 0
    assert after.step == state.step + 1
    chex.assert_trees_all_equal(after.params, before[0])
    chex.assert_trees_all_equal(after.opt_state, before[1])
    since = np.asarray(after.scales.since)
    assert since[2, 1] == 0 and (np.delete(since.ravel(), 5) > 0).all()
    # clamped to the greatest, from where the next update is finite or divides again
    assert after.scales.scale[2, 1] == 16 * 2.0**24


def test_float16_kernels_move_as_float32_ones_but_for_rounding(trained):
    """Their gradients are float16 too; moments and EMA are not."""
    _, update, start = trained
    settings = {"model": MODEL, "precision": "float16", "warmup_steps": 0}
    stage = eight.stage("prior", kernels="float16", **settings)
    state = jax.eval_shape(lambda key: state_lib.init_state(stage, key), jax.random.key(0))
    halves = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if leaf.dtype == jnp.float16
    }
    assert len(halves) == 4
    assert all(".params['layers']" in path and "['kernel']" in path for path in halves)

    rounded = jax.tree.map(lambda x, as_: x.astype(as_.dtype), start.params, state.params)
    chex.assert_trees_all_equal_dtypes(
        jax.eval_shape(jax.grad(lambda p: stage.loss(p, batch(), None, None)[0]), rounded), rounded
    )
    exact = start.replace(params=state_lib.as_float32(rounded))
    expected, _ = update(jax.tree.map(jnp.copy, exact), batch())
    step = make_train_step(stage, ema_decay=0.5)
    found, metrics = step(jax.tree.map(jnp.copy, start.replace(params=rounded)), batch())
    assert metrics["skipped"] == 0
    chex.assert_trees_all_equal_dtypes(found.params, rounded)
    for part in ("attention_out", "mlp_in"):
        old, one, two = (
            np.asarray(x.params["layers"][part]["kernel"], np.float32)
            for x in (exact, expected, found)
        )
        moved, rounding = np.abs(one - old).mean(), np.abs(old).mean() * 2.0**-11
        assert np.abs(two - one).mean() < 0.05 * moved + rounding < moved
        average = found.ema_params["layers"][part]["kernel"]
        before = start.ema_params["layers"][part]["kernel"]
        np.testing.assert_allclose(average, (before + two) / 2, rtol=1e-6, atol=1e-7)


def test_float16_kernels_want_gradient_scales():
    with pytest.raises(UserError, match="kernels is float16, but with precision bfloat16"):
        eight.stage("prior", precision="bfloat16", kernels="float16")


def test_only_float16_has_scales():
    assert eight.stage("prior").scaling is None
    assert eight.stage("prior", precision="bfloat16").scaling is None
