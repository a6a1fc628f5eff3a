"""What a layer remembers while codes are drawn one after the other: only what it can still see.

    kind     slots of the image's keys and values        at G = 32, of 1024
    dense    one for each position                         1024
    row      a ring of G + 1                               33
    column   G columns of G; one of them is read           1024, reads 32
    conv     a ring as long as the window's reach          192

Keys and values of the text are computed once for a prompt and read by all of its samples.

Letters: U prompts, W samples of each, B = U * W batch, N heads, H head size, P text positions,
D = N * H width, G grid side, I = G * G image positions, Z lanes (columns, or one), S slots of a
lane.
"""

from functools import cache as remembered
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dalle_jax.models.masks import Kind, attention_mask


class Cache(NamedTuple):
    """Keys and values of one layer."""

    text_key: Float[Array, "U N P H"]
    text_value: Float[Array, "U N P H"]
    key: Float[Array, "U*N*W Z*S H"]
    value: Float[Array, "U*N*W Z*S H"]


class Layout(NamedTuple):
    """Where the image positions of a layer kind are kept, and which slots a query may look at."""

    lane: Int[np.ndarray, " I"]
    slot: Int[np.ndarray, " I"]
    seen: Bool[np.ndarray, "I S"]
    """For each query position, the slots of its lane that hold a key it may see."""


@remembered
def layout(kind: Kind, *, grid: int, kernel: int) -> Layout:
    """Plans the cache of a layer kind from its attention mask.

    Args:
      kind: layer kind, as in `attention_mask`.
      grid: side G of the square of image positions.
      kernel: side of the convolution window; only "conv" reads it.

    Returns:
      Lanes and slots of all positions; a later position takes the slot of one that is out of reach.

    Source: ours.
    """
    mask = attention_mask(kind, text_length=1, grid=grid, kernel=kernel)[1:, 1:]
    position = np.arange(grid * grid)
    if kind == "column":
        lane, slot = position % grid, position // grid
    else:
        query, key = np.nonzero(mask)
        lane, slot = np.zeros_like(position), position % ((query - key).max() + 1)
    held = np.full((grid * grid, lane.max() + 1, slot.max() + 1), -1)  # position in each slot
    for p in position:
        held[p:, lane[p], slot[p]] = p
    held = held[position, lane]  # I S
    seen = (held >= 0) & np.take_along_axis(mask, np.maximum(held, 0), axis=1)
    return Layout(lane, slot, seen)


def init_cache(
    text_key: Float[Array, "U P N H"],
    text_value: Float[Array, "U P N H"],
    *,
    kind: Kind,
    grid: int,
    kernel: int,
    samples: int,
) -> Cache:
    """Makes the cache of a layer that has read the text and no image yet.

    Args:
      text_key: keys of the text positions of each prompt.
      text_value: their values.
      kind: layer kind; with grid and kernel as in `layout`.
      grid: side G.
      kernel: side of the convolution window.
      samples: images W drawn for each prompt.
    """
    U, _, N, H = text_key.shape
    lane, _, seen = layout(kind, grid=grid, kernel=kernel)
    room = jnp.zeros((U * N * samples, (lane.max() + 1) * seen.shape[1], H), text_key.dtype)
    return Cache(jnp.swapaxes(text_key, 1, 2), jnp.swapaxes(text_value, 1, 2), room, room)


def attend(
    cache: Cache,
    plan: Layout,
    query: Float[Array, "D B"],
    key: Float[Array, "D B"],
    value: Float[Array, "D B"],
    *,
    position: Int[Array, ""],
) -> tuple[Float[Array, "D B"], Cache]:
    """Adds one image position to the cache and looks at all that it may see.

    Args:
      cache: of this layer, holding the positions before.
      plan: `layout` of this layer's kind.
      query: of this position, one image a column, the samples of a prompt next to each other.
      key: of this position.
      value: of this position.
      position: raster position p in [0, I).

    Returns:
      What `attention.dense` gives for this query, and the cache with the position added.

    Source: ours.
    """
    U, N, P, H = cache.text_key.shape
    lane, slot, seen = (jnp.asarray(table)[position] for table in plan)
    S = seen.shape[0]

    def rows(x):  # D B -> U N W H
        return x.reshape(N, H, U, -1).transpose(2, 0, 3, 1)

    query, key, value = rows(query * H**-0.5), rows(key), rows(value)

    def added(held, new):
        """The lane with this position, and all lanes: XLA copies what it reads after writing."""
        seen = jax.lax.dynamic_slice_in_dim(held, lane * S, S, axis=1)
        seen = jax.lax.dynamic_update_slice_in_dim(seen, new.reshape(-1, 1, H), slot, axis=1)
        return seen, jax.lax.dynamic_update_slice_in_dim(held, seen, lane * S, axis=1)

    keys, held_keys = added(cache.key, key)
    values, held_values = added(cache.value, value)
    far = _product("UNWH,UNPH->UNWP", query, cache.text_key)
    near = _product("XH,XSH->XS", query.reshape(-1, H), keys)
    near = jnp.where(seen[None], near, -jnp.inf).reshape(*far.shape[:3], S)
    weights = jnp.concatenate([far, near], axis=-1)
    weights = jnp.exp(weights - weights.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    mixed = _product("UNWP,UNPH->UNWH", weights[..., :P], cache.text_value)
    near = _product("XS,XSH->XH", weights[..., P:].reshape(-1, S), values)
    mixed = ((mixed + near.reshape(mixed.shape)) / total).astype(value.dtype)
    cache = cache._replace(key=held_keys, value=held_values)
    return mixed.transpose(1, 3, 0, 2).reshape(N * H, -1), cache


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
