"""What a training run carries from step to step, on the mesh and in a checkpoint.

Source: ours; the EMA follows Ramesh et al. 2021, appendices A.2 and B.2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from dalle_jax.parallel import sharding_rules
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.parallel.sharding_rules import Rules
from dalle_jax.train.stage import Stage


@struct.dataclass
class TrainState:
    """Everything a train step reads and writes; all of it is saved in every checkpoint.

    Every field is a tree, since JAX also makes states of shapes or of shardings.
    """

    step: PyTree
    """Steps done, int32 scalar."""
    params: PyTree
    """Float32, or float16 where the run stores kernels so."""
    ema_params: PyTree
    """Exponential moving average (EMA) of params, in float32; for samples and export."""
    opt_state: PyTree
    key: PyTree
    """Typed key scalar, never changed: the key of a step is fold_in(key, step)."""
    scales: PyTree = ()
    """Gradient scales, a ScaleState; empty for none."""
    powersgd: PyTree = ()
    """A PowerSGDState of all groups; in a checkpoint the sum of their errors; empty for none."""


def init_state(
    stage: Stage, key: Key[Array, ""], groups: PowerSGDGroups | None = None
) -> TrainState:
    """Makes the state before the first step; the EMA starts as a copy of the parameters."""
    key_init, key_steps = jax.random.split(key)
    params = stage.init(key_init)
    in_float32 = as_float32(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, in_float32),  # own buffers: the step donates both
        opt_state=stage.optimizer.init(in_float32),
        key=key_steps,
        scales=stage.scaling.create() if stage.scaling else (),
        powersgd=groups.init(params) if groups else (),
    )


def state_shardings(
    state: TrainState,
    mesh: Mesh,
    rules: Rules,
    groups: PowerSGDGroups | None = None,
    *,
    ema_on_host: bool = False,
) -> TrainState:
    """The sharding of each array of a state; takes the state or its shapes."""
    shardings = sharding_rules.shardings(state.replace(powersgd=()), mesh, rules)
    if ema_on_host:
        ema_params = jax.tree.map(
            lambda place: place.with_memory_kind("pinned_host"), shardings.ema_params
        )
        shardings = shardings.replace(ema_params=ema_params)
    return shardings.replace(powersgd=groups.shardings(shardings.params) if groups else ())


def on_devices(state: TrainState) -> TrainState:
    """The state with its EMA in the memory of the devices, wherever it was."""
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), state.ema_params)
    return state.replace(ema_params=jax.device_put(state.ema_params, places))


def to_checkpoint(state: TrainState, groups: PowerSGDGroups | None) -> TrainState:
    """What a checkpoint saves of a state."""
    return state.replace(powersgd=groups.summed_error(state.powersgd)) if groups else state


def checkpoint_shapes(
    shapes: TrainState, shardings: TrainState, groups: PowerSGDGroups | None
) -> TrainState:
    """Shapes and shardings of what a checkpoint saves, from those of a state."""
    shapes = jax.eval_shape(partial(to_checkpoint, groups=groups), shapes)
    if groups:
        shardings = shardings.replace(powersgd=groups.summed_error_shardings(shardings.params))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def from_checkpoint(
    saved: TrainState, shardings: TrainState, groups: PowerSGDGroups | None
) -> TrainState:
    """Turns what a checkpoint saved into a state on the current mesh."""
    if not groups:
        return saved
    powersgd = groups.restore(saved.powersgd, saved.params, shardings.powersgd)
    return saved.replace(powersgd=powersgd)


def as_float32(params: PyTree) -> PyTree:
    """Parameters as the optimizer sees them, whatever they are stored in."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def with_params(state: TrainState, shardings: TrainState, params: PyTree) -> TrainState:
    """Replaces the parameters of a new state and their EMA; each device gets its shards."""

    def put(x, sharding, old):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return jnp.array(x, old.dtype, copy=True)  # own buffers, as in `init_state`
        x = np.asarray(x, old.dtype)
        return jax.make_array_from_callback(x.shape, sharding, lambda shard: x[shard])

    return state.replace(
        params=jax.tree.map(put, params, shardings.params, state.params),
        ema_params=jax.tree.map(put, params, shardings.ema_params, state.ema_params),
    )
