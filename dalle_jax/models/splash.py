"""Attention under the paper's masks by the Pallas kernel of JAX for TPUs, "splash attention".

The kernel computes only the blocks of 128 x 128 logits that hold a visible key, and keeps no logit
in the device's memory. In raster order a column touches every block, so column layers go through
the image column by column instead.

Letters: B batch, T positions, P text positions, G grid side, N heads, H head size.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jaxtyping import Array, Bool, Float, Int

from dalle_jax.models.masks import Kind, attention_mask

BLOCK = 128  # the least that the kernel takes


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    *,
    kind: Kind,
    text_length: int,
    grid: int,
    kernel: int = 11,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Gives what `attention.blocked` gives.

    Args:
      query: one vector a head and position, text first: T = text_length + grid * grid.
      key: as query.
      value: what is mixed; its dtype is that of the result.
      kind: layer kind, as in `attention_mask`.
      text_length: text positions P.
      grid: side G of the square of image positions.
      kernel: side of the convolution window; only "conv" reads it.
      interpret: run the kernel step by step on any device, for tests.
    Returns:
      Weighted means of the values; logits and softmax are computed in float32.
    Source: the kernel is JAX's; block order of columns ours.
    """
    T, H = query.shape[1], query.shape[-1]
    order, mask = blocks(kind, text_length=text_length, grid=grid, kernel=kernel)
    attend = splash_attention_kernel.make_splash_mha_single_device(
        np.broadcast_to(mask, (query.shape[2], *mask.shape)), interpret=interpret
    )

    def arranged(x):  # B N S H, S >= T a multiple of the block
        x = jnp.pad(x[:, order], ((0, 0), (0, len(mask) - T), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)

    seen = jax.vmap(attend)(arranged(query * H**-0.5), arranged(key), arranged(value))
    return jnp.swapaxes(seen, 1, 2)[:, np.argsort(order)].astype(value.dtype)


@cache
def blocks(
    kind: Kind, *, text_length: int, grid: int, kernel: int
) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, "S S"]]:
    """Order of the positions, and the mask in this order, padded to whole blocks.

    Padding sees itself alone, and nothing sees it.
    """
    mask = attention_mask(kind, text_length=text_length, grid=grid, kernel=kernel)
    T = len(mask)
    order = np.arange(T)
    if kind == "column":
        cells = order[text_length:].reshape(grid, grid)
        order = np.concatenate([order[:text_length], cells.T.ravel()])
    padded = np.eye(-(-T // BLOCK) * BLOCK, dtype=bool)
    padded[:T, :T] = mask[np.ix_(order, order)]
    return order, padded


def share_computed(kind: Kind, *, text_length: int, grid: int, kernel: int = 11) -> float:
    """The share of all T * T logits that the kernel computes for a kind of layer."""
    _, mask = blocks(kind, text_length=text_length, grid=grid, kernel=kernel)
    parts = mask.reshape(len(mask) // BLOCK, BLOCK, -1, BLOCK)
    T = text_length + grid**2
    return float(parts.any(axis=(1, 3)).sum() * BLOCK**2 / T**2)
