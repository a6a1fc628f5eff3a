"""float16 with a gradient scale for each resblock, in the update of the prior."""

import dataclasses

import chex
import eight
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    broken = dataclasses.replace(
        jax.tree.map(jnp.copy, state), scales=state.scales.replace(scale=scale)
    )
    after, metrics = update(broken, batch())
    assert metrics["skipped"] == 1 and metrics["update_norm"] == 0 and metrics["grad_norm"] == 0
    assert after.step == state.step + 1
    chex.assert_trees_all_equal(after.params, before[0])
    chex.assert_trees_all_equal(after.opt_state, before[1])
    since = np.asarray(after.scales.since)
    assert since[2, 1] == 0 and (np.delete(since.ravel(), 5) > 0).all()
    # clamped to the greatest, from where the next update is finite or divides again
    assert after.scales.scale[2, 1] == 16 * 2.0**24


def test_only_float16_has_scales():
    assert eight.stage("prior").scaling is None
    assert eight.stage("prior", precision="bfloat16").scaling is None
