"""Stacked kernels of the layers as batches of matrices, which PowerSGD compresses one by one.

Letters: L layers, D width, N heads, H head size, F mlp.

Source: Ramesh et al. 2021, appendix E, table 2.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dalle_jax.errors import UserError


class _Kernel(NamedTuple):
    """Which axes of a kernel make batch, rows and columns, and which one is sharded."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    sharded: int
    """The axis that fsdp shards."""


_KERNELS = {
    "qkv": _Kernel((0, 2), (1,), (3, 4), sharded=1),  # L D 3 N H
    "attention_out": _Kernel((0,), (1, 2), (3,), sharded=3),  # L N H D
    "mlp_in": _Kernel((0,), (1,), (2,), sharded=2),  # L D F
    "mlp_out": _Kernel((0,), (1,), (2,), sharded=1),  # L F D
}


def to_matrices(
    kernel: Float[Array, "L ..."], name: str, *, shards: int = 1
) -> Float[Array, "batch m n"]:
    """Turns a stacked kernel into the matrices that are compressed one by one.

    Args:
      kernel: qkv [L, D, 3, N, H], attention_out [L, N, H, D], mlp_in [L, D, F] or
        mlp_out [L, F, D].
      name: which of these.
      shards: equal parts that each matrix is cut into, on the axis that `sharding_rules` shards:
        its columns, those of mlp_out its rows.
    Returns:
      Matrices with m <= n, transposed where that takes it; those of the first shards come first,
      so that shards on several devices stay there.
    Raises:
      ValueError: for another name, or if the shards would not be equal.
    Source: Ramesh et al. 2021, appendix E, table 2.
    """
    order, _, m, n = matrix_plan(kernel.shape, name, shards)
    kind = _KERNELS[name]
    before, after = kernel.shape[: kind.sharded], kernel.shape[kind.sharded + 1 :]
    parts = jnp.moveaxis(kernel.reshape(*before, shards, -1, *after), kind.sharded, 0)
    x = parts.transpose(order).reshape(-1, m, n)
    return x.swapaxes(1, 2) if m > n else x


def from_matrices(
    matrices: Float[Array, "batch m n"], name: str, shape: tuple[int, ...], *, shards: int = 1
) -> Float[Array, "L ..."]:
    """Undoes `to_matrices`.

    Args:
      matrices: what it returned, or as many others of the same size.
      name: of the kernel.
      shape: of the kernel.
      shards: as given there.
    Returns:
      The kernel.
    Raises:
      ValueError: as there.
    """
    order, stacked, m, n = matrix_plan(shape, name, shards)
    x = matrices.swapaxes(1, 2) if m > n else matrices
    parts = x.reshape([stacked[i] for i in order]).transpose(np.argsort(order))
    return jnp.moveaxis(parts, 0, _KERNELS[name].sharded).reshape(shape)


def matrix_plan(shape, name, shards):
    """Axes of the stacked shards in the order of matrices, the shards' shape, rows and columns."""
    if name not in _KERNELS:
        raise ValueError(
            f"cannot compress the kernel of {name!r}, only those of {list(_KERNELS)}; add to "
            "dalle_jax/parallel/kernel_matrices.py how its axes make matrices"
        )
    kind = _KERNELS[name]
    if shape[kind.sharded] % shards:
        raise UserError(
            f"axis {kind.sharded} of the {name} kernel {list(shape)} cannot be cut into {shards} "
            "equal shards; choose shards that divide it"
        )
    shard_shape = list(shape)
    shard_shape[kind.sharded] //= shards
    order = (0, *(axis + 1 for axis in kind.batch + kind.rows + kind.columns))
    m, n = (math.prod(shard_shape[axis] for axis in axes) for axes in (kind.rows, kind.columns))
    return order, (shards, *shard_shape), m, n
