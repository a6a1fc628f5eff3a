"""Samples codes from priors that others trained, one after the other, in one compiled loop.

Letters: U prompts, B images, P caption slots, G grid side, K codebook.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dalle_jax.generate.logits import check_inputs, guide, sample_logits, traced_options
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import gpt_prior, seq2seq_prior
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig

ImportedConfig = Seq2SeqConfig | GPTConfig
"""Sizes of dalle-mini's prior, or of minDALL-E's or ruDALL-E's."""


def sample(
    config: ImportedConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U P"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    prompt_codes: Int[Array | np.ndarray, "B G G"] | None = None,
    keep_rows: int = 0,
) -> Int[Array, "B G G"]:
    """Samples grids of codes, as `autoregressive_sampler.sample` does from our prior.

    Guidance is against the empty caption of the prior.

    Source: Dayma et al. 2021; Kim et al. 2021; ruDALL-E (2021); the authors' releases.
    """
    check_inputs(config, text, keys, sampling)
    if prompt_codes is None:
        prompt_codes = jnp.zeros((keys.size, config.grid, config.grid), jnp.int32)
    return _sample(
        config,
        params,
        jnp.asarray(text),
        keys,
        **traced_options(sampling),
        prompt_codes=jnp.asarray(prompt_codes, jnp.int32),
        prompt_length=jnp.int32(keep_rows * config.grid),
    )


@partial(jax.jit, static_argnums=0)
def _sample(
    config, params, text, keys, *, temperature, top_k, top_p, guidance, prompt_codes, prompt_length
):
    B, G = keys.shape[0], config.grid
    network = gpt_prior if isinstance(config, GPTConfig) else seq2seq_prior
    guided = guidance is not None  # None has no leaves, so that jit compiles it in
    if guided:
        empty = jnp.broadcast_to(network.empty_caption(config), text.shape)
        text = jnp.concatenate([text, empty])
    captions = network.encode(config, params, text)

    def step(carry, inputs):
        cache, previous = carry
        position, prompt_code = inputs
        previous = jnp.tile(previous, 2) if guided else previous
        logits, cache = network.decode_step(config, params, captions, cache, previous, position)
        of_position = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        code, _ = sample_logits(guide(logits, guidance), of_position, temperature, top_k, top_p)
        code = jnp.where(position < prompt_length, prompt_code, code)
        return (cache, code), code

    cache = network.init_cache(config, 2 * B if guided else B)
    inputs = jnp.arange(config.image_length), prompt_codes.reshape(B, -1).T
    _, codes = jax.lax.scan(step, (cache, jnp.zeros(B, jnp.int32)), inputs)
    return codes.T.reshape(B, G, G)
