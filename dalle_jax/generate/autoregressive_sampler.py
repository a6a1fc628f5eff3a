"""Samples codes from the autoregressive prior, one after the other, in one compiled loop.

Letters: U prompts, W samples of each, B = U * W batch, P text positions, I = G * G image positions,
G grid side, K codebook.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.logits import (
    check_inputs,
    empty_captions,
    guide,
    sample_logits,
    traced_options,
)
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.prior_config import PriorConfig

CALLS = 4  # a grid is sampled in at most so many calls of equal parts, to be seen on its way


def sample(
    config: PriorConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    prompt_codes: Int[Array | np.ndarray, "B G G"] | None = None,
    keep_rows: int = 0,
) -> Int[Array, "B G G"]:
    """Samples grids of codes, the same number for each caption.

    The prefill of a caption serves all of its samples. The code at raster position p is sampled
    with the key fold_in(key, p) of its image, so a sample does not depend on the batch, up to
    float32 rounding, which batch sizes may change. The numbers of captions and samples are compiled
    in, and whether there is a top_k, a top_p and guidance; other values of these compile nothing.

    Args:
      config: sizes of the prior.
      params: its weights, as `Prior(config).init` lays them out under "params".
      text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
      keys: one typed key (`jax.random.key`) per image: those of the first caption, then those of
        the next one, and so on.
      sampling: how to sample. Guidance doubles the work, and the prior must have seen empty
        captions (all pads) in training; options of the progressive decoder are ignored.
      prompt_codes: codes of one image per sample, whose top rows are kept; None for no prompt.
      keep_rows: how many rows of prompt_codes are kept, in [0, G].

    Returns:
      Codes in [0, K).

    Raises:
      ValueError: for a value outside its range, or sizes that do not fit each other.

    Source: Ramesh et al. 2021, section 2.6 and figure 2, for temperature and kept rows.
    """
    rows = sample_rows(
        *(config, params, text, keys),
        sampling=sampling,
        prompt_codes=prompt_codes,
        keep_rows=keep_rows,
    )
    return jnp.concatenate(list(rows), axis=1)


def sample_rows(
    config: PriorConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    prompt_codes: Int[Array | np.ndarray, "B G G"] | None = None,
    keep_rows: int = 0,
) -> Iterator[Int[Array, "B rows G"]]:
    """Samples as `sample` does, and gives a few rows of codes at a time, from the top."""
    check_inputs(config, text, keys, sampling)
    _check_prompt(config, keys, prompt_codes, keep_rows)
    B, G = keys.shape[0], config.grid
    known = jnp.zeros((B, G, G), jnp.int32) if prompt_codes is None else jnp.asarray(prompt_codes)
    options = traced_options(sampling)
    guided = options["guidance"] is not None
    caches = _prefill(config, params, jnp.asarray(text), samples=B // len(text), guided=guided)
    previous = jnp.zeros(B, jnp.int32)
    for rows in np.split(np.arange(G), max(n for n in range(1, CALLS + 1) if G % n == 0)):
        codes, caches = _sample_rows(
            config,
            params,
            keys,
            caches,
            previous,
            known[:, rows[0] : rows[-1] + 1].astype(jnp.int32),
            **options,
            first=jnp.int32(rows[0] * G),
            prompt_length=jnp.int32(keep_rows * G),
        )
        previous = codes[:, -1, -1]
        yield codes


@partial(jax.jit, static_argnames=("config", "samples", "guided"))
def _prefill(config, params, text, *, samples, guided):
    if guided:
        text = jnp.concatenate([text, empty_captions(config, text)])
    return bind_prior(config, params).prefill(text, samples=samples)


@partial(jax.jit, static_argnames="config", donate_argnames="caches")
def _sample_rows(
    config, params, keys, caches, previous, known, *, temperature, top_k, top_p, guidance, first,
    prompt_length,
):  # fmt: skip
    guided = guidance is not None  # None has no leaves, so that jit compiles it in
    decode = bind_prior(config, params).decode_step()

    def step(carry, inputs):
        caches, previous = carry
        position, known = inputs
        previous = jnp.tile(previous, 2) if guided else previous
        logits, caches = decode(caches, previous, position)  # B K, or twice B
        of_position = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        code, _ = sample_logits(guide(logits, guidance), of_position, temperature, top_k, top_p)
        code = jnp.where(position < prompt_length, known, code)
        return (caches, code), code

    positions = first + jnp.arange(known[0].size)
    (caches, _), codes = jax.lax.scan(
        step, (caches, previous), (positions, known.reshape(len(known), -1).T)
    )
    return codes.T.reshape(known.shape), caches


def bind_prior(config: PriorConfig, params: dict) -> AutoregressivePrior:
    """The prior with its weights, whose kernels say the type of its products."""
    dtype = params["layers"]["mlp_in"]["kernel"].dtype
    return AutoregressivePrior(config, dtype=dtype).bind({"params": params})


def _check_prompt(config, keys, prompt_codes, keep_rows):
    B, G = keys.size, config.grid
    if not 0 <= keep_rows <= G:
        raise UserError(f"keep_rows is {keep_rows}, but must lie in 0..{G}, the rows of the grid")
    if prompt_codes is None:
        if keep_rows:
            raise ValueError(
                f"keep_rows is {keep_rows}, but there is no image to keep rows of; "
                "give prompt_codes, or keep_rows=0"
            )
    elif prompt_codes.shape != (B, G, G):
        raise ValueError(
            f"prompt_codes have shape {tuple(prompt_codes.shape)}, but {B} images on grid {G} "
            f"need {(B, G, G)}, one prompt per image"
        )
    elif B and not 0 <= prompt_codes.min() <= prompt_codes.max() < config.codes:
        raise ValueError(
            f"prompt_codes lie in {prompt_codes.min()}..{prompt_codes.max()}, but the codebook has "
            f"0..{config.codes - 1}; were they made by another dVAE?"
        )
