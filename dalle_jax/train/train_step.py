"""The train step: state and batch in, state and metrics out.

It is built from small steps, each around the one before:

    apply_gradients    gradients of the loss, the optimizer's update of the parameters
    skip_nonfinite     keeps parameters and moments where a gradient is not finite
    update_scales      moves the gradient scales of float16
    update_ema         moves the EMA of the parameters
    count              counts the step

Gradients come from `micro_batched`, `unscaled` and, with PowerSGD, `PowerSGDGroups.reduce`.

Source: ours; the EMA follows Ramesh et al. 2021, appendices A.2 and B.2.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from dalle_jax.errors import UserError
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.train.resblock_scaling import ResblockScaling
from dalle_jax.train.stage import Batch, Metrics, Stage
from dalle_jax.train.state import TrainState, as_float32


class StepOutput(NamedTuple):
    """What one of the small steps returns."""

    state: TrainState
    metrics: Metrics
    finite: Bool[Array, ""] | None = None
    """Whether all gradients are finite; None if nobody asks."""
    block_finite: Any = ()
    """The same for each resblock, if there are gradient scales."""


Step = Callable[[TrainState, Batch], StepOutput]


def make_train_step(
    stage: Stage,
    *,
    shardings: TrainState | None = None,
    groups: PowerSGDGroups | None = None,
    accumulation_steps: int = 1,
    ema_every: int | None = 1,
    ema_decay: float = 0.999,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted train step `(state, batch) -> (state, metrics)`; it consumes the state.

    With `accumulation_steps` = k the batch is cut into k micro-batches, and their losses, metrics
    and gradients are averaged with equal weight. That equals the whole batch when the loss is a
    mean over examples. A mean over a varying number of tokens weighs the micro-batches equally all
    the same, which is not quite the mean over all tokens.

    Args:
      stage: has the loss and the optimizer.
      shardings: of the state, from `state_shardings`; None for one device.
      groups: send each other compressed gradients; None to average gradients in full. The losses of
        groups have equal weight, as those of micro-batches have.
      accumulation_steps: micro-batches k per step, at least 1.
      ema_every: steps between two updates of the EMA; None for a step that leaves it alone, since
        `make_ema_update` is for it.
      ema_decay: d in ema = d * ema + (1 - d) * params, in [0, 1).

    Returns:
      The step. Its metrics are the stage's own and loss, grad_norm (after accumulation, before the
      optimizer clips), update_norm and param_norm (after the update): f32 scalars. Gradient scales
      add min_scale and max_scale; they or groups add skipped: 1 for a step with a gradient that is
      not finite, which changes nothing but the scales and the error buffers of groups.
    """
    step = apply_gradients(stage, groups, accumulation_steps)
    if stage.scaling or groups:
        step = skip_nonfinite(step)
    if stage.scaling:
        step = update_scales(step, stage.scaling)
    if ema_every is not None:
        step = update_ema(step, every=ema_every, decay=ema_decay)
    step = count(step)
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    if ema_every is None:  # the EMA does not take part
        shardings = shardings.replace(ema_params=())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(shardings.step.mesh):  # models constrain their activations to it
            return jitted(state, batch)

    def beside_ema(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics = on_mesh(state.replace(ema_params=()), batch)
        return new.replace(ema_params=state.ema_params), metrics

    return beside_ema if ema_every is None else on_mesh


def make_ema_update(shardings: TrainState, *, decay: float) -> Callable[[TrainState], TrainState]:
    """Builds the update of an EMA that lies in the memory of the CPUs; it consumes the state's EMA.

    Its arrays visit the devices one at a time, between two steps, when these need least.

    Args:
      shardings: of the state, from `state_shardings` with `ema_on_host`.
      decay: d in ema = d * ema + (1 - d) * params, in [0, 1).
    Source: Ramesh et al. 2021, appendix B.2.
    """

    @cache
    def moved(place):
        def move(average, x):
            average = jax.device_put(average, place.with_memory_kind("device"))
            return _averaged(average, x, decay)

        return jax.jit(move, donate_argnums=0, out_shardings=place)

    def update(state: TrainState) -> TrainState:
        return state.replace(
            ema_params=jax.tree.map(
                lambda place, average, x: moved(place)(average, x),
                shardings.ema_params,
                state.ema_params,
                state.params,
            )
        )

    return update


def apply_gradients(stage: Stage, groups: PowerSGDGroups | None, accumulation_steps: int) -> Step:
    """Moves the parameters by the optimizer's update."""
    gradients = unscaled(micro_batched(stage, accumulation_steps), stage.scaling)

    def of_group(params, batch, key, step, scales):
        if stage.scaling:  # a mean over a part of the batch has larger gradients by as much
            scales = scales.replace(scale=scales.scale / groups.count)
        return gradients(params, batch, key, step, scales)

    def step(state: TrainState, batch: Batch) -> StepOutput:
        key = jax.random.fold_in(state.key, state.step)
        args = (state.params, batch, key, state.step, state.scales)
        if groups:
            averages, grads, powersgd, norm, finite = groups.reduce(of_group, state.powersgd, *args)
            (loss, metrics), block_finite = averages
            state = state.replace(powersgd=powersgd)
        else:
            (loss, metrics), block_finite, grads = gradients(*args)
            norm = optax.global_norm(grads)
            finite = jnp.isfinite(norm) & block_finite.all() if stage.scaling else None
        updates, opt_state = stage.optimizer.update(
            grads, state.opt_state, as_float32(state.params), value=loss
        )
        params = optax.apply_updates(state.params, updates)
        norms = {"grad_norm": norm, "update_norm": optax.global_norm(updates)}
        state = state.replace(params=params, opt_state=opt_state)
        return StepOutput(state, metrics | {"loss": loss} | norms, finite, block_finite)

    return step


def skip_nonfinite(inner: Step) -> Step:
    """Keeps parameters and moments as they were unless all gradients are finite."""

    def step(state: TrainState, batch: Batch) -> StepOutput:
        output = inner(state, batch)
        new, metrics, finite = output.state, output.metrics, output.finite

        def unless_skipped(new, old):
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        kept = new.replace(
            params=unless_skipped(new.params, state.params),
            opt_state=unless_skipped(new.opt_state, state.opt_state),
        )
        norms = {name: jnp.where(finite, metrics[name], 0) for name in ("grad_norm", "update_norm")}
        metrics = metrics | norms | {"skipped": 1 - finite.astype(jnp.float32)}
        return output._replace(state=kept, metrics=metrics)

    return step


def update_scales(inner: Step, scaling: ResblockScaling) -> Step:
    """Moves the gradient scale of each resblock by whether its gradients are finite."""

    def step(state: TrainState, batch: Batch) -> StepOutput:
        output = inner(state, batch)
        scales = scaling.update(state.scales, output.block_finite)
        range_ = {"min_scale": scales.scale.min(), "max_scale": scales.scale.max()}
        return output._replace(
            state=output.state.replace(scales=scales), metrics=output.metrics | range_
        )

    return step


def update_ema(inner: Step, *, every: int, decay: float) -> Step:
    """Moves the EMA of the parameters towards them, in every so many steps."""

    def step(state: TrainState, batch: Batch) -> StepOutput:
        output = inner(state, batch)
        params = output.state.params
        ema_params = jax.lax.cond(
            (state.step + 1) % every == 0,
            lambda ema: jax.tree.map(partial(_averaged, decay=decay), ema, params),
            lambda ema: ema,
            state.ema_params,
        )
        return output._replace(state=output.state.replace(ema_params=ema_params))

    return step


def _averaged(average, x, decay):
    return decay * average + (1 - decay) * x


def count(inner: Step) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Counts the step and adds the norm of the parameters to the metrics."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        output = inner(state, batch)
        metrics = output.metrics | {
            "param_norm": optax.global_norm(as_float32(output.state.params))
        }
        return output.state.replace(step=state.step + 1), metrics

    return step


def unscaled(gradients: Callable, scaling: ResblockScaling | None) -> Callable:
    """Gradients divided by their scales, from those of `micro_batched`.

    Returns:
      `(params, batch, key, step, scales) -> ((loss, metrics), block_finite, grads)`.
    """

    def call(params, batch, key, step, scales):
        if not scaling:
            measures, grads = gradients(params, batch, key, step)
            return measures, (), grads
        measures, grads = gradients(params, batch, key, step, scales=scales.scale)
        grads, block_finite = scaling.unscale(grads, scales)
        return measures, block_finite, grads

    return call


def micro_batched(stage: Stage, k: int) -> Callable:
    """Gradients of a stage's loss: their mean over k micro-batches, with one in memory at a time.

    Returns:
      `(params, batch, key, step, **scales) -> ((loss, metrics), grads)`.
    """
    gradients = jax.value_and_grad(stage.loss, has_aux=True)
    return gradients if k == 1 else partial(_mean_over_micro_batches, gradients, k)


def _mean_over_micro_batches(gradients, k: int, params, batch, key, step, **scales) -> PyTree:
    def split(x):
        if x.shape[0] % k:
            raise UserError(
                f"a batch of {x.shape[0]} examples cannot be cut into {k} equal micro-batches; "
                f"choose a batch size that is a multiple of accumulation_steps={k}"
            )
        # Every k-th example, not k runs: a batch sharded by examples then stays where it is.
        return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)  # k B/k ...

    def body(total, item):
        index, micro_batch = item
        result = gradients(params, micro_batch, jax.random.fold_in(key, index), step, **scales)
        return jax.tree.map(jnp.add, total, result), None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(partial(gradients, **scales), params, first, key, step)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(k), micro_batches))
    return jax.tree.map(lambda x: x / k, total)
