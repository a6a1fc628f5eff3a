"""The devices of all processes as one mesh, and how batches and whole arrays pass through it.

"data" counts groups of devices that each hold the whole state, "fsdp" the devices that share the
state of a group, each working on images of its own, "tensor" those that share the work on one.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from dalle_jax.errors import UserError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = PartitionSpec((DATA, FSDP))


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged; their number is data x fsdp x tensor."""

    data: int | None = None
    """Groups that each hold the whole state; None for what the others leave."""
    fsdp: int = 1
    """Devices that share weights, gradients and optimizer state, gathered layer by layer."""
    tensor: int = 1
    """Devices that share the heads and the MLP of every layer."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is not None and size < 1:
                raise UserError(f"mesh {field.name} is {size}, but has to be at least 1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices.

    Args:
      config: sizes of the axes.
      devices: those to arrange; None for all of all processes.
    Raises:
      UserError: if their number does not fit the sizes.
    """
    count = jax.device_count() if devices is None else len(devices)
    shared = config.fsdp * config.tensor
    data = count // shared if config.data is None else config.data
    if data * shared != count:
        wanted = "" if config.data is None else f"data={config.data} x "
        raise UserError(
            f"a mesh of {wanted}fsdp={config.fsdp} x tensor={config.tensor} does not fit "
            f"{count} devices; their product has to be, or to divide, that number"
        )
    sizes = {DATA: data, FSDP: config.fsdp, TENSOR: config.tensor}
    axes = (tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    return jax.make_mesh(*axes, devices=devices)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts this process's part of a batch on its devices.

    Args:
      mesh: of all processes.
      batch: host arrays whose first axis is this process's examples; the parts of all processes,
        in their order, are the batch.
    Returns:
      Global arrays, the examples spread over data and fsdp.
    Raises:
      UserError: if the examples cannot be spread evenly.
    """
    shares = mesh.shape[DATA] * mesh.shape[FSDP]
    sharding = NamedSharding(mesh, BATCH)

    def place(part):
        examples = len(part) * jax.process_count()
        if examples % shares:
            raise UserError(
                f"a batch of {examples} examples cannot be spread over {shares} devices "
                f"(data={mesh.shape[DATA]} x fsdp={mesh.shape[FSDP]}); choose a multiple"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(part))

    return jax.tree.map(place, batch)


def place_captions(
    params: PyTree, text: Int[Array | np.ndarray, "U slots"], keys: Key[Array, " B"]
) -> tuple[Int[Array | np.ndarray, "U2 slots"], Key[Array, " B"]]:
    """Spreads captions and their images over the groups of devices that each hold a whole model.

    Args:
      params: of the prior, wherever they lie.
      text: captions [U, slots].
      keys: one for each image [B], the images of a caption next to each other.
    Returns:
      Both, each group with its part. Where groups have to share a caption, it stands there once for
      each of them, with that part of its images. They stay as they are without a mesh, or if the
      images cannot be cut evenly.
    """
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)  # NumPy's arrays have none
    mesh = getattr(place, "mesh", None)
    if mesh is None or mesh.is_multi_process or mesh.shape.get(DATA, 1) == 1:
        return text, keys
    copies = mesh.shape[DATA] // math.gcd(len(text), mesh.shape[DATA])
    if len(keys) // len(text) % copies:
        return text, keys
    groups = NamedSharding(mesh, PartitionSpec(DATA))
    return jax.device_put((np.repeat(text, copies, axis=0), keys), groups)


def constrain_batch(x: Array) -> Array:
    """Keeps an array [B, ...] spread by examples over the mesh of `jax.set_mesh`, if there is one.

    Left free, the compiler may spread activations as the weights are and send them around instead.
    """
    return _constrain(x, *BATCH)


def gather_rows(table: Array, ids: Array) -> Array:
    """Rows [B, T, D] of a table [V, D] that is cut across D, cut as it is.

    Every device looks up its part of the rows for all images of its group, so that no table
    travels. Left free, the compiler gathers the rows' gradients of all images everywhere.
    """
    return _constrain(table[_constrain(ids, DATA)], DATA, None, FSDP)


def _constrain(x, *axes):
    """Keeps x spread over axes of the mesh, if there is one, but for those already divided."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def free(names):
        names = names if isinstance(names, tuple) else (names,)
        return tuple(name for name in names if name not in (None, *mesh.manual_axes))

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(free, axes)))


def gather_to_host(tree: PyTree) -> PyTree:
    """Arrays that every process can read: as they are, or gathered on the host from all processes.

    With more than one process, all of them have to call it.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def on_one_device(tree: PyTree) -> PyTree:
    """Arrays that every device has, as they are on the first device of this process."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def max_over_processes(mesh: Mesh, value: int) -> Int[Array, ""]:
    """The greatest of what all processes give; comes when the devices get to it, without waiting.

    All processes have to call it, between the same updates.
    """
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = np.full(len(mesh.local_devices), value, np.int32)
    return _greatest(mesh)(jax.make_array_from_process_local_data(everywhere, mine))


@cache
def _greatest(mesh):
    return jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
