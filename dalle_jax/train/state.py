"""What a training run carries from step to step, and the one jitted function that moves it.

Source: ours; the EMA follows Ramesh et al. 2021, appendices A.2 and B.2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.parallel import sharding_rules
from dalle_jax.parallel.powersgd_groups import Groups
from dalle_jax.parallel.sharding_rules import Rules
from dalle_jax.train.resblock_scaling import ResblockScaling

Batch = PyTree  # a dict of arrays, each with the batch B as first axis
Metrics = dict[str, Array]  # names to f32 scalars


class Stage(ABC):
    """What the loop needs to know about a model in training; one class per stage inherits it."""

    name: str
    """Short name, used in the log and in file names."""

    optimizer: optax.GradientTransformationExtraArgs
    """Its update receives the loss as `value=`."""

    rules: Rules = ()
    """Where its parameters lie on a mesh; needed by `train`, not by `make_train_step` alone."""

    scaling: ResblockScaling | None = None
    """Gradient scales, for float16; None for none."""

    @abstractmethod
    def init(self, key: Key[Array, ""]) -> PyTree:
        """Draws the parameters; pure and traced under jit."""

    @abstractmethod
    def loss(
        self, params: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""], **scales
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the mean loss over the batch; pure and traced under jit.

        Args:
          params: parameters being trained.
          batch: what the iterator yields, or one micro-batch of it.
          key: differs for every step and micro-batch.
          step: updates done so far, from 0, for schedules.
          scales: `scales`, the gradient scales, if the stage has any.

        Returns:
          Loss in f32, and metrics, each a f32 scalar that is a mean over the batch too.
        """

    def init_from_data(self, params: PyTree) -> PyTree:
        """Gives the parameters that a new run starts from; may look at data.

        Args:
          params: as `init` has drawn them, spread over the mesh.
        Returns:
          The same tree if nothing is to change; else one whose new arrays have the same values in
          all processes, whether they are on the host or spread as the old ones.
        """
        return params

    def evaluate(self, params: PyTree) -> dict[str, float]:
        """Measures averaged parameters on held-out data, on the host; may be slow."""
        del params
        return {}

    def sheet(self, params: PyTree) -> UInt8[np.ndarray, "H W 3"] | None:
        """Draws an image of what averaged parameters can do, or nothing."""
        del params
        return None


@struct.dataclass
class TrainState:
    """Everything an update reads and writes; saved whole in every checkpoint.

    Every field is a tree, since JAX also makes states of shapes or of shardings.
    """

    step: PyTree
    """Updates done, int32 scalar."""
    params: PyTree
    ema_params: PyTree
    """Exponential moving average (EMA) of params, of the same structure; for samples and export."""
    opt_state: PyTree
    key: PyTree
    """Typed key scalar, never changed: the key of a step is fold_in(key, step)."""
    scales: PyTree = ()
    """Gradient scales, a ScaleState; empty for none."""
    powersgd: PyTree = ()
    """Of all groups, a PowerSGDState; in a checkpoint the sum of their errors; empty for none."""


def init_state(stage: Stage, key: Key[Array, ""], groups: Groups | None = None) -> TrainState:
    """Makes the state before the first update; the EMA starts as a copy of the parameters."""
    key_init, key_steps = jax.random.split(key)
    params = stage.init(key_init)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # own buffers: both are donated to the update
        opt_state=stage.optimizer.init(params),
        key=key_steps,
        scales=stage.scaling.create() if stage.scaling else (),
        powersgd=groups.create(params) if groups else (),
    )


def shardings(
    state: TrainState, mesh: Mesh, rules: Rules, groups: Groups | None = None
) -> TrainState:
    """Says where each array of a state lies; takes the state or its shapes."""
    places = sharding_rules.shardings(state.replace(powersgd=()), mesh, rules)
    return places.replace(powersgd=groups.places(places.params) if groups else ())


def to_checkpoint(state: TrainState, groups: Groups | None) -> TrainState:
    """What a checkpoint keeps of a state."""
    return state.replace(powersgd=groups.total(state.powersgd)) if groups else state


def checkpoint_shapes(shapes: TrainState, places: TrainState, groups: Groups | None) -> TrainState:
    """Shapes and shardings of what a checkpoint keeps, from those of a state."""
    shapes = jax.eval_shape(partial(to_checkpoint, groups=groups), shapes)
    if groups:
        places = places.replace(powersgd=groups.total_places(places.params))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def from_checkpoint(saved: TrainState, places: TrainState, groups: Groups | None) -> TrainState:
    """Turns what a checkpoint kept into a state on the mesh of today."""
    if not groups:
        return saved
    powersgd = groups.resumed(saved.powersgd, saved.params, places.powersgd)
    return saved.replace(powersgd=powersgd)


def with_params(state: TrainState, places: TrainState, params: PyTree) -> TrainState:
    """Gives a fresh state other parameters to start from; each device takes its part of them."""

    def put(x, place):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(place, x.ndim):
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda part: x[part])

    params = jax.tree.map(put, params, places.params)
    ema_params = jax.tree.map(jnp.copy, params)  # own buffers, as in `init_state`
    return state.replace(params=params, ema_params=ema_params)


def make_train_step(
    stage: Stage,
    *,
    places: TrainState | None = None,
    groups: Groups | None = None,
    accumulation_steps: int = 1,
    ema_every: int = 1,
    ema_decay: float = 0.999,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted update `(state, batch) -> (state, metrics)`; the given state is consumed.

    With `accumulation_steps` = k the batch is cut into k micro-batches whose losses, metrics and
    gradients are averaged with equal weight. That equals the whole batch when the loss is a mean
    over examples; a loss averaged over a count of tokens that varies between examples weighs the
    micro-batches equally all the same, which is not quite the mean over all tokens.

    Args:
      stage: gives the loss and the optimizer.
      places: where the state lies, as `shardings` says; None for one device.
      groups: which send each other compressed gradients; None to average whole ones. The losses of
        groups have equal weight, as those of micro-batches have.
      accumulation_steps: micro-batches k per update, at least 1.
      ema_every: updates between two updates of the EMA.
      ema_decay: d in ema = d * ema + (1 - d) * params, in [0, 1).

    Returns:
      The update. Its metrics are the stage's own and loss, grad_norm (after accumulation, before
      the optimizer clips), update_norm and param_norm (after the update): f32 scalars. With
      gradient scales there are the least and the greatest of them too; with these or groups,
      skipped: 1 for an update with a gradient that was not finite, which changes nothing but the
      scales and what groups keep of the gradients.
    """
    scaling = stage.scaling

    def gradients(params, batch, key, step, scales):
        """Loss and metrics, which resblocks are finite, and gradients without their scales."""
        differentiate = jax.value_and_grad(stage.loss, has_aux=True)
        if scaling:
            differentiate = partial(differentiate, scales=scales.scale)
        if accumulation_steps == 1:
            measures, grads = differentiate(params, batch, key, step)
        else:
            measures, grads = _accumulated(
                differentiate, accumulation_steps, params, batch, key, step
            )
        grads, finite = scaling.unscale(grads, scales) if scaling else (grads, ())
        return measures, finite, grads

    def of_group(params, batch, key, step, scales):
        if scaling:  # the mean over a part of the batch has gradients that are larger by as much
            scales = scales.replace(scale=scales.scale / groups.count)
        return gradients(params, batch, key, step, scales)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        given = (state.params, batch, key, state.step, state.scales)
        powersgd = state.powersgd
        if groups:
            told, grads, powersgd, norm, well = groups.reduce(of_group, powersgd, *given)
            (loss, metrics), finite = told
        else:
            (loss, metrics), finite, grads = gradients(*given)
            norm = optax.global_norm(grads)
            well = jnp.isfinite(norm) & finite.all() if scaling else None
        scales = scaling.update(state.scales, finite) if scaling else ()
        if well is not None:
            grads = _unless(~well, grads, jax.tree.map(jnp.zeros_like, grads))
            norm = jnp.where(well, norm, 0)
        updates, opt_state = stage.optimizer.update(
            grads, state.opt_state, state.params, value=loss
        )
        if well is not None:
            updates = _unless(~well, updates, grads)
            opt_state = _unless(~well, opt_state, state.opt_state)
            metrics = metrics | {"skipped": 1 - well.astype(jnp.float32)}
        if scaling:
            metrics = metrics | {
                "min_scale": scales.scale.min(),
                "max_scale": scales.scale.max(),
            }
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        ema_params = jax.lax.cond(
            step % ema_every == 0,
            lambda old: jax.tree.map(lambda a, p: ema_decay * a + (1 - ema_decay) * p, old, params),
            lambda old: old,
            state.ema_params,
        )
        metrics = metrics | {
            "loss": loss,
            "grad_norm": norm,
            "update_norm": optax.global_norm(updates),
            "param_norm": optax.global_norm(params),
        }
        return state.replace(
            step=step,
            params=params,
            ema_params=ema_params,
            opt_state=opt_state,
            scales=scales,
            powersgd=powersgd,
        ), metrics

    if places is None:
        return jax.jit(update, donate_argnums=0)
    placed = jax.jit(update, donate_argnums=0, out_shardings=(places, None))

    def on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(places.step.mesh):  # models may ask where activations lie
            return placed(state, batch)

    return on_mesh


def _unless(skipped, tree, instead):
    return jax.tree.map(lambda x, y: jnp.where(skipped, y, x), tree, instead)


def _accumulated(differentiate, k: int, params, batch, key, step):
    """Mean over k micro-batches of what `differentiate` returns, with one in memory at a time."""

    def split(x):
        if x.shape[0] % k:
            raise UserError(
                f"a batch of {x.shape[0]} examples cannot be cut into {k} equal micro-batches; "
                f"choose a batch size that is a multiple of accumulation_steps={k}"
            )
        # Every k-th example, not k runs: a batch sharded by examples then stays where it is.
        return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)  # k B/k ...

    def body(total, item):
        index, part = item
        result = differentiate(params, part, jax.random.fold_in(key, index), step)
        return jax.tree.map(jnp.add, total, result), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda x: x[0], parts), key, step)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(k), parts))
    return jax.tree.map(lambda x: x / k, total)
