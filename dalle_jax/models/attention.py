"""Attention over text and image keys together, in two forms with one result.

`dense` is the reference: every logit, and a mask. `blocked` computes only the logits that a layer
kind can use, plus a few: image queries are cut into blocks, and each block meets the text and the
one window of image positions that holds everything it may see.

    kind     block             window                             image logits a query, G = 32
    dense    a run of T / 4    all positions up to its end        640 on average
    row      2 rows (1, G odd) these and the row above            96
    column   1 column          the column                         32
    conv     2 rows (1, G odd) these and kernel // 2 + 1 above    256

Letters: B batch, T query positions, S key positions, P text positions, G grid side, I = G * G,
N heads, H head size, M blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dalle_jax.models.masks import Kind, attention_mask


def dense(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array | np.ndarray, "*images T S"],
) -> Float[Array, "B T N H"]:
    """Mixes values by one softmax over all the keys that a query may see, text and image alike.

    It computes every logit and needs B * N * T * S of them at once.

    Args:
      query: one vector a head and position.
      key: as query, for the positions that are looked at.
      value: what is mixed; its dtype is that of the result.
      mask: True where a query may look at a key, in all images [T, S] or in each [B or 1, T, S];
        at least one True in each row.

    Returns:
      Weighted means of the values; logits and softmax are computed in float32.

    Source: Ramesh et al. 2021, appendix B.1 (one softmax beat a separate one for text and image).
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    mask = mask.reshape(-1, 1, *mask.shape[-2:])  # 1 or B, heads
    logits = jnp.where(mask, logits * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def blocked(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    *,
    kind: Kind,
    text_length: int,
    grid: int,
    kernel: int = 11,
) -> Float[Array, "B T N H"]:
    """Gives what `dense` gives with `attention_mask` of the same arguments, for less work.

    Args:
      query: one vector a head and position, text first: T = text_length + grid * grid.
      key: as query.
      value: what is mixed; its dtype is that of the result.
      kind: layer kind, as in `attention_mask`.
      text_length: text positions P.
      grid: side G of the square of image positions.
      kernel: side of the convolution window; only "conv" reads it.

    Returns:
      Weighted means of the values; logits and softmax are computed in float32.

    Source: ours.
    """
    query = query * query.shape[-1] ** -0.5
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # B N T H
    P = text_length
    if kind == "dense":
        seen = _causal(query, key, value)
    else:
        blocks = _blocks(kind, grid, kernel)
        text = _causal(query[:, :, :P], key[:, :, :P], value[:, :, :P])
        image = _image(query[:, :, P:], key, value, P, blocks)
        seen = jnp.concatenate([text, image], axis=2)
    return jnp.swapaxes(seen, 1, 2)


class _Blocks(NamedTuple):
    """How the image is cut: `cut` and `join` turn [B N I ...] into [B N M t ...] and back."""

    cut: Callable[[Array], Array]
    join: Callable[[Array], Array]
    window: Callable[[Array], Array]
    """Keys or values [B N I H] to the windows [B N M s H]."""
    mask: Bool[np.ndarray, "M t s"]


def _image(query, key, value, P, blocks):
    """One softmax over the logits of the text and of a block's window, without joining them."""
    keys, values = (blocks.window(x[:, :, P:]) for x in (key, value))
    far = _logits("BNTH,BNSH->BNTS", query, key[:, :, :P])
    near = _logits("BNMTH,BNMSH->BNMTS", blocks.cut(query), keys)
    near = jnp.where(blocks.mask[None, None], near, -jnp.inf)
    top = jnp.maximum(far.max(axis=-1), blocks.join(near.max(axis=-1)))  # B N I
    top = jax.lax.stop_gradient(top)  # any number would do, so that it needs no gradient
    far = jnp.exp(far - top[..., None])
    near = jnp.exp(near - blocks.cut(top)[..., None])
    total = far.sum(axis=-1) + blocks.join(near.sum(axis=-1))
    from_text = _mix("BNTS,BNSH->BNTH", far, value[:, :, :P])
    from_image = _mix("BNMTS,BNMSH->BNMTH", near, values)
    return ((from_text + blocks.join(from_image)) / total[..., None]).astype(value.dtype)


def _causal(query, key, value):
    """Runs of queries, each against all keys up to its end: 5/8 of all logits with four runs."""
    T = query.shape[2]
    size = -(-T // 4)
    seen = []
    for start in range(0, T, size):
        end = min(start + size, T)
        logits = _logits("BNTH,BNSH->BNTS", query[:, :, start:end], key[:, :, :end])
        mask = np.tri(end - start, end, start, dtype=bool)
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1)
        seen.append(_mix("BNTS,BNSH->BNTH", weights, value[:, :, :end]).astype(value.dtype))
    return jnp.concatenate(seen, axis=2)


def _logits(spec, query, key):
    return jnp.einsum(spec, query, key, preferred_element_type=jnp.float32)


def _mix(spec, weights, value):
    weights = weights.astype(value.dtype)
    return jnp.einsum(spec, weights, value, preferred_element_type=jnp.float32)


def _blocks(kind, G, kernel):
    seen = attention_mask(kind, text_length=1, grid=G, kernel=kernel)[1:, 1:].reshape(G, G, G, G)

    if kind == "column":

        def turn(x):  # rows and columns change places, so that a column lies in one piece
            return jnp.swapaxes(x.reshape(*x.shape[:2], G, G, *x.shape[3:]), 2, 3)

        def turn_back(x):
            return jnp.swapaxes(x, 2, 3).reshape(*x.shape[:2], G * G, *x.shape[4:])

        mask = np.stack([seen[:, c, :, c] for c in range(G)])
        return _Blocks(cut=turn, join=turn_back, window=turn, mask=mask)

    above = 1 if kind == "row" else min(kernel // 2 + 1, G - 1)  # grid rows that the window adds
    rows = 2 if G % 2 == 0 else 1  # a block of two is faster than one or four on a CPU
    M = G // rows

    def cut(x):
        return x.reshape(*x.shape[:2], M, rows * G, *x.shape[3:])

    def join(x):
        return x.reshape(*x.shape[:2], G * G, *x.shape[4:])

    def window(x):
        B, N, _, H = x.shape
        x = jnp.pad(x.reshape(B, N, G, G, H), ((0, 0), (0, 0), (above, 0), (0, 0), (0, 0)))
        x = jnp.stack([x[:, :, at : at + above + rows] for at in range(0, G, rows)], axis=2)
        return x.reshape(B, N, M, -1, H)

    padded = np.pad(seen, ((0, 0), (0, 0), (above, 0), (0, 0)))
    mask = [padded[at : at + rows, :, at : at + above + rows] for at in range(0, G, rows)]
    return _Blocks(cut, join, window, np.stack(mask).reshape(M, rows * G, -1))
