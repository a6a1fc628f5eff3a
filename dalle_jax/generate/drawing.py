"""What both ways of drawing share: one draw from logits, captions without words, and the checks.

Letters: U prompts, B batch, K codebook.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.filters import filter_logits
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig


def drawn(
    logits: Float[Array, "B *cells K"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""] | None,
    top_p: Float[Array, ""] | None,
) -> tuple[Int[Array, " B *cells"], Float[Array, " B *cells"]]:
    """Draws codes, each picture by its own key, and gives the log-probability of each.

    Options are those of `sample`; at temperature 0 the likeliest codes come, with their
    log-probability at 1.
    """
    greedy = temperature == 0
    # with the best at 0, tiny temperatures send the others to -inf and nothing to nan
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = filter_logits(logits / jnp.where(greedy, 1, temperature), top_k=top_k, top_p=top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    codes = jnp.argmax(logits + jnp.where(greedy, 0, noise), axis=-1)
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return codes.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def empty_captions(
    config: PriorConfig | ProgressiveConfig, text: Int[Array, "U slots"]
) -> Int[Array, "U slots"]:
    """Captions without a token, as many as given: what guidance compares with."""
    empty = config.text_vocabulary + jnp.arange(config.text_length - 1, dtype=text.dtype)
    return jnp.broadcast_to(empty, text.shape)


def check_inputs(
    config: PriorConfig | ProgressiveConfig,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Array,
    sampling: SamplingConfig,
) -> None:
    """Raises UserError if captions, keys and options do not fit each other or the prior."""
    U = text.shape[0]
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys have dtype {keys.dtype}, but must come from jax.random.key")
    if keys.ndim != 1 or not U or keys.size % U:
        raise UserError(
            f"got {U} captions and keys of shape {keys.shape}; give one key an image, as many for "
            "each caption, for example jax.random.split(key, number)"
        )
    if sampling.top_k is not None and sampling.top_k > config.codes:
        raise UserError(
            f"top_k is {sampling.top_k}, but must lie in 1..{config.codes}, the size of the "
            "codebook; leave it out to sample from all codes"
        )


def traced_options(sampling: SamplingConfig) -> dict[str, Array | None]:
    """Options whose values a compiled sampler takes as inputs, so that new ones compile nothing.

    None has no leaves: whether there is a top_k, a top_p and guidance is compiled in.
    """
    guided = sampling.guidance != 1
    return {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": None if sampling.top_k is None else jnp.int32(sampling.top_k),
        "top_p": None if sampling.top_p is None else jnp.float32(sampling.top_p),
        "guidance": jnp.float32(sampling.guidance) if guided else None,
    }
