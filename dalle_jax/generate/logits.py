"""From logits to codes: guidance's empty captions, temperature, top-k, top-p, and one sample.

Letters: U prompts, B batch, K codebook.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.part_checks import AnyPriorConfig
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.image_parts import map_images
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig

NUMBERS = 2**21  # drawn at once for several images: a TPU makes some twenty arrays on the way


def filter_logits(
    logits: Float[Array, "*batch K"],
    *,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch K"]:
    """Masks all but the likeliest codes: first top-k, then top-p of what that leaves.

    Args:
      logits: unnormalised log-probabilities, already divided by the temperature.
      top_k: how many codes to keep, at least 1; above K it keeps all. None: no limit.
      top_p: share of the probability to keep, in (0, 1]; the code that crosses it is kept too.
        None: no limit.

    Returns:
      The logits, with -inf for the masked codes. Of codes that tie for the last place, the
      lowest are kept, so that the number is exact.

    Source: ours; the paper truncates nothing (Ramesh et al. 2021, section 2.6).

    >>> filter_logits(jnp.array([1.0, 3.0, 2.0]), top_k=2).tolist()
    [-inf, 3.0, 2.0]
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
    # float32 sums can reach 1 before the last code, so that 1 is not left to the comparison; a
    # top_p that float32 rounds to 0 still keeps one code
    inside = (before < top_p) | jnp.greater_equal(top_p, 1) | (rank == 0)
    return jnp.sum(inside & (rank < top_k), axis=-1, keepdims=True)


def sample_logits(
    logits: Float[Array, "B *cells K"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""] | None,
    top_p: Float[Array, ""] | None,
) -> tuple[Int[Array, " B *cells"], Float[Array, " B *cells"]]:
    """Samples one code for each cell, with the key of its image.

    Args:
      logits: of the codes of some cells, or of one cell, of each image.
      keys: one per image.
      temperature: divides the logits; at 0 the likeliest codes are taken.
      top_k: see `filter_logits`.
      top_p: see `filter_logits`.
    Returns:
      Codes, and their log-probabilities (at temperature 0, those of temperature 1).
    """

    def sample(logits, keys):
        return _sample_logits(logits, keys, temperature, top_k, top_p)

    numbers = math.prod(logits.shape[1:])
    return map_images(sample, logits, keys, numbers_each=numbers, numbers=NUMBERS)


def _sample_logits(logits, keys, temperature, top_k, top_p):
    greedy = temperature == 0
    # with the best at 0, tiny temperatures send the others to -inf and nothing to nan
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = filter_logits(logits / jnp.where(greedy, 1, temperature), top_k=top_k, top_p=top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    codes = jnp.argmax(logits + jnp.where(greedy, 0, noise), axis=-1)
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return codes.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def guide(logits: Float[Array, "B2 *cells K"], scale: Float[Array, ""] | None) -> Array:
    """Classifier-free guidance, u + s (c - u) of logits with (c) and without (u) the caption.

    Args:
      logits: those with the caption, then those without; if scale is None, those with it alone.
      scale: s; None for no guidance.
    Returns:
      Logits of each image.
    Source: Ho and Salimans 2021.
    """
    if scale is None:
        return logits
    with_caption, without = jnp.split(logits, 2)
    return without + scale * (with_caption - without)


def empty_captions(
    config: PriorConfig | ProgressiveConfig, text: Int[Array, "U slots"]
) -> Int[Array, "U slots"]:
    """Captions without a token, as many as in `text`, for guidance."""
    empty = config.text_vocabulary + jnp.arange(config.text_length - 1, dtype=text.dtype)
    return jnp.broadcast_to(empty, text.shape)


def check_inputs(
    config: AnyPriorConfig,
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
            f"got {U} captions and keys of shape {keys.shape}; give one key per image, as "
            "many for each caption, for example jax.random.split(key, number)"
        )
    if sampling.top_k is not None and sampling.top_k > config.codes:
        raise UserError(
            f"top_k is {sampling.top_k}, but must lie in 1..{config.codes}, the size of the "
            "codebook; leave it out to sample from all codes"
        )


def traced_options(sampling: SamplingConfig) -> dict[str, Array | None]:
    """Options as inputs of a compiled sampler, for which new values compile nothing.

    None is no input: whether there is a top_k, a top_p and guidance is compiled in.
    """
    return {
        "temperature": jnp.float32(1 if sampling.temperature is None else sampling.temperature),
        "top_k": None if sampling.top_k is None else jnp.int32(sampling.top_k),
        "top_p": None if sampling.top_p is None else jnp.float32(sampling.top_p),
        "guidance": jnp.float32(sampling.guidance) if sampling.guided else None,
    }
