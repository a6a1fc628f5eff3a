"""Which codes may be drawn: the k likeliest, or as few as hold a given share of the probability.

Letters: K codebook.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def filter_logits(
    logits: Float[Array, "*batch K"],
    *,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch K"]:
    """Rules out all but the likeliest codes: first top-k, then top-p of what that leaves.

    Args:
      logits: unnormalised log-probabilities, already divided by the temperature.
      top_k: how many codes to keep, at least 1; above K it keeps all. None: no limit.
      top_p: share of the probability to keep, in (0, 1]; the code that crosses it is kept too.
        None: no limit.

    Returns:
      The logits, with -inf for what is ruled out. Of codes that tie for the last place, the
      lowest are kept, so that the number is exact.

    Source: ours; the paper truncates nothing (Ramesh et al. 2021, section 2.6).
    """
    if top_k is None and top_p is None:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    top_k = logits.shape[-1] if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    count = _count(descending, top_k, top_p)
    last = jnp.take_along_axis(descending, count - 1, axis=-1)
    above, level = logits > last, logits == last
    room = count - above.sum(axis=-1, keepdims=True)
    keep = above | (level & (jnp.cumsum(level, axis=-1) <= room))
    return jnp.where(keep, logits, -jnp.inf)


def _count(descending, top_k, top_p):
    """How many of the first k hold the share top_p of their probability."""
    rank = jnp.broadcast_to(jnp.arange(descending.shape[-1]), descending.shape)
    share = jax.nn.softmax(jnp.where(rank < top_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    # float32 sums can reach 1 before the last code, so that 1 is not left to the comparison
    inside = (before < top_p) | jnp.greater_equal(top_p, 1)
    return jnp.sum(inside & (rank < top_k), axis=-1, keepdims=True)
