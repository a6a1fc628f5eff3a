"""Attention over text and image keys together.

Letters: B batch, T query positions, S key positions, N heads, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T N H"]:
    """Mixes values by one softmax over all the keys that a query may see, text and image alike.

    This is the dense reference: it computes every logit and needs B * N * T * S of them at once.
    Any faster form takes the same query, key and value and must give the same result.

    Args:
      query: one vector a head and position.
      key: as query, for the positions that are looked at.
      value: what is mixed; its dtype is that of the result.
      mask: True where a query may look at a key; at least one True in each row.

    Returns:
      Weighted means of the values; logits and softmax are computed in float32.

    Source: Ramesh et al. 2021, appendix B.1 (one softmax beat a separate one for text and image).
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[None, None], logits * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)
