import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.train import state as state_lib
from dalle_jax.train.stage import Stage
from dalle_jax.train.train_step import make_train_step


class Line(Stage):
    """Fits y = x w + b by least squares."""

    name = "line"

    def __init__(self, optimizer=None):
        self.optimizer = optax.with_extra_args_support(optimizer or optax.sgd(0.1))

    def init(self, key):
        return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}

    def loss(self, params, batch, key, step):
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


class Noisy(Line):
    """Its loss shows the key and the step it was given."""

    def loss(self, params, batch, key, step):
        loss, _ = super().loss(params, batch, key, step)
        return loss, {"noise": jax.random.normal(key), "seen_step": step.astype(jnp.float32)}


def batch_of(size):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(size, 3)).astype(np.float32),
        "y": rng.normal(size=size).astype(np.float32),
    }


def test_accumulated_update_equals_whole_batch(key):
    stage = Line(optax.adamw(1e-2))
    results = []
    for k in (1, 4):
        step = make_train_step(stage, accumulation_steps=k)
        state = state_lib.init_state(stage, key)
        for _ in range(3):
            state, metrics = step(state, batch_of(8))
        results.append((state.params, state.ema_params, metrics["loss"], metrics["grad_norm"]))
    chex.assert_trees_all_close(results[0], results[1], atol=1e-6)


def test_micro_batches_get_keys_of_their_own(key):
    state = state_lib.init_state(Noisy(), key)
    key_step = jax.random.fold_in(state.key, 0)
    expected = np.mean([jax.random.normal(jax.random.fold_in(key_step, i)) for i in range(2)])
    _, metrics = make_train_step(Noisy(), accumulation_steps=2)(state, batch_of(4))
    np.testing.assert_allclose(metrics["noise"], expected, rtol=1e-6)


def test_batch_that_does_not_split_evenly_is_refused(key):
    step = make_train_step(Line(), accumulation_steps=4)
    with pytest.raises(ValueError, match="batch of 6 examples cannot be cut into 4 equal micro-ba"):
        step(state_lib.init_state(Line(), key), batch_of(6))


def test_ema_is_the_written_out_formula_every_second_step(key):
    step = make_train_step(Line(), ema_every=2, ema_decay=0.75)
    state = state_lib.init_state(Line(), key)
    expected = np.array(state.params["w"])
    for n in range(1, 6):
        state, _ = step(state, batch_of(8))
        if n in (2, 4):
            expected = 0.75 * expected + 0.25 * np.array(state.params["w"])
        np.testing.assert_allclose(state.ema_params["w"], expected, rtol=1e-6)


def test_step_counts_updates_and_keys_follow_it(key):
    state = state_lib.init_state(Noisy(), key)
    expected = [jax.random.normal(jax.random.fold_in(state.key, n)) for n in range(3)]
    step = make_train_step(Noisy())
    for n in range(3):
        state, metrics = step(state, batch_of(4))
        assert metrics["seen_step"] == n
        np.testing.assert_allclose(metrics["noise"], expected[n], rtol=1e-6)
    assert state.step == 3 and state.step.dtype == jnp.int32


def test_metrics_hold_loss_and_norms(key):
    state = state_lib.init_state(Line(), key)
    batch = batch_of(4)
    (loss, _), grads = jax.value_and_grad(Line().loss, has_aux=True)(state.params, batch, key, 0)
    state, metrics = make_train_step(Line())(state, batch)
    assert set(metrics) == {"loss", "worst", "grad_norm", "update_norm", "param_norm"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"], 0.1 * metrics["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(metrics["param_norm"], optax.global_norm(state.params), rtol=1e-6)


def test_optimizer_sees_the_loss_as_value(key):
    def update(grads, state, params=None, *, value):
        return jax.tree.map(jnp.zeros_like, grads), value

    stage = Line(optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update))
    state, metrics = make_train_step(stage)(state_lib.init_state(stage, key), batch_of(4))
    assert state.opt_state == metrics["loss"]
