"""Samples codes from the autoregressive prior in full passes instead of one code after the other.

Letters: U prompts, W samples of each, B = U * W batch, G grid side, I = G * G, K codebook.

A sample is a function of the logits and of noise that is known beforehand (the Gumbel noise of each
position). So the codes are the one solution of I equations, each of which needs the codes before
its own alone, and Jacobi iteration finds it: every pass computes all positions from the codes of
the pass before. Each pass settles at least one more code, and mostly several, so that it ends after
I passes at the latest, with the codes of the step-by-step sampler.

Source: Song et al. 2021 (arXiv 2002.03629); frozen noise as in Teng et al. 2024 (arXiv 2410.01699).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dalle_jax.generate.autoregressive_sampler import bind_prior
from dalle_jax.generate.logits import (
    check_inputs,
    empty_captions,
    guide,
    sample_logits,
    traced_options,
)
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.prior_config import PriorConfig


def sample(
    config: PriorConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    known: Int[Array | np.ndarray, "B G G"] | None = None,
) -> tuple[Int[Array, "B G G"], Int[Array, ""]]:
    """Samples the grids that `autoregressive_sampler.sample` gives for the same keys.

    They are equal up to float32 rounding, which can turn a sample that is as good as a tie.

    Args:
      config: sizes of the prior.
      params: its weights.
      text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
      keys: one typed key an image: all those of the first caption, then all of the next one.
      sampling: how to sample; choices of the progressive decoder do not count.
      known: codes that are kept, K in all other cells. None: no code is known.
    Returns:
      Codes in [0, K), and how many passes it took for all images of the batch.
    Raises:
      UserError: for a value outside its range, or sizes that do not fit each other.
    """
    check_inputs(config, text, keys, sampling)
    B, G = keys.shape[0], config.grid
    if known is None:
        known = jnp.full((B, G, G), config.codes, jnp.int32)
    return _sample(config, params, jnp.asarray(text), keys, known, **traced_options(sampling))


@partial(jax.jit, static_argnames="config")
def _sample(config, params, text, keys, known, *, temperature, top_k, top_p, guidance):
    prior = bind_prior(config, params)
    B = len(keys)
    text = jnp.repeat(text, B // len(text), axis=0)
    known = known.reshape(B, -1)
    positions = jnp.arange(config.image_length)
    of_position = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(keys, positions)
    both = text if guidance is None else jnp.concatenate([text, empty_captions(config, text)])

    def improve(carry):
        codes, _, passes = carry
        _, logits = prior(both, codes if guidance is None else jnp.tile(codes, (2, 1)))  # B I K
        new, _ = jax.vmap(sample_logits, (1, 0, None, None, None), 1)(
            guide(logits, guidance), of_position, temperature, top_k, top_p
        )
        new = jnp.where(known < config.codes, known, new)
        return new, (new != codes).any(), passes + 1

    start = jnp.where(known < config.codes, known, 0), jnp.bool(True), jnp.int32(0)
    codes, _, passes = jax.lax.while_loop(lambda carry: carry[1], improve, start)
    return codes.reshape(B, config.grid, config.grid), passes
