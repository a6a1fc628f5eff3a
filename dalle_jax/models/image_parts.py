"""Work on a few images of a batch at a time, so that what it needs between them stays small."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree


def map_images(
    f: Callable[..., PyTree], *inputs: PyTree, numbers_each: int, numbers: int
) -> PyTree:
    """Applies a function of whole batches to parts of one, one after the other.

    An accelerator then keeps arrays between two operations close to its multipliers, where those of
    the whole batch would go to its memory and back each time.

    Args:
      f: of arrays [B, ...], to arrays [B, ...]; no image depends on another.
      inputs: for f.
      numbers_each: numbers in the largest array that f makes for one image.
      numbers: in such an array of a part, at most, if a part has more than one image.
    Returns:
      What f gives, up to rounding.
    """
    B = len(jax.tree.leaves(inputs)[0])
    most = max(numbers // numbers_each, 1)
    size = max(n for n in range(1, B + 1) if B % n == 0 and n <= most)
    if size == B:
        return f(*inputs)
    parts = jax.tree.map(lambda x: x.reshape(B // size, size, *x.shape[1:]), inputs)
    mapped = jax.lax.map(lambda part: f(*part), parts)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), mapped)
