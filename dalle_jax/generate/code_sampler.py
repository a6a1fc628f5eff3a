"""Samples grids of codes for captions, in micro-batches that fit memory.

Letters: U prompts, W samples of each, F passes, G grid side, K codebook, T all positions, D width,
L layers. The code K stands for a cell that is not filled.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from dalle_jax.errors import UserError
from dalle_jax.generate import (
    autoregressive_sampler,
    imported_sampler,
    jacobi_sampler,
    progressive_sampler,
)
from dalle_jax.generate.imported_sampler import ImportedConfig
from dalle_jax.generate.micro_batching import rectangles
from dalle_jax.generate.part_checks import AnyPriorConfig
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.kv_cache import layout
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.parallel.mesh import place_captions
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.caption import normalize_caption


class Samples(NamedTuple):
    """The samples of one micro-batch."""

    prompts: Int[np.ndarray, " U"]
    """Indices of the captions."""
    sample_numbers: Int[np.ndarray, " W"]
    """Numbers of the samples of each of these captions."""
    passes: Int[np.ndarray, "F U W G G"]
    """Codes after each stage and revision; a single pass of the autoregressive prior."""
    empty_code: int
    """K, the code of cells that are not filled yet."""


def sample_codes(
    config: AnyPriorConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    n: int,
    seed: int,
    sampling: SamplingConfig = SamplingConfig(),
    known: Int[np.ndarray, "#n G G"] | None = None,
) -> Iterator[Samples]:
    """Samples n grids for each caption, and yields them by micro-batches as they are done.

    Args:
      config: sizes of a prior of any kind.
      params: its weights.
      tokenizer: belongs to it.
      prompts: captions, normalized and truncated as in training; the log counts truncated ones.
      n: images of each.
      seed: in [0, 2**32). A grid depends on seed, caption and its number alone.
      sampling: how to sample; the decoder is that of the prior.
      known: codes of cells that are kept, for each sample number or once for all; K in the others.
        For an autoregressive prior these are whole rows at the top, as many for each.
    Raises:
      UserError: if an argument is out of its range.
    """
    check_request(prompts, n=n, seed=seed)
    if known is not None:
        known = np.broadcast_to(known, (n, *known.shape[1:]))
    prompts = [normalize_caption(prompt) for prompt in prompts]
    text = tokenizer.encode(prompts, length=config.text_length - 1)
    hashes = np.asarray([caption_hash(prompt) for prompt in prompts], np.uint32)
    for rows, columns in rectangles(len(prompts), n, bytes_each(config, sampling)):
        u, w = len(rows.indices), len(columns.indices)
        keys = image_keys(
            np.full(u * w, seed, np.uint32),
            hashes[rows.indices].repeat(w),
            np.tile(columns.indices, u).astype(np.uint32),
        )
        start = None if known is None else np.concatenate([known[columns.indices]] * u)
        inputs = (config, params, *place_captions(params, text[rows.indices], keys))
        parts = list(sample_in_parts(*inputs, sampling=sampling, known=start))
        whole_passes = isinstance(config, ProgressiveConfig)
        passes = np.concatenate(parts) if whole_passes else parts[-1]
        passes = passes.reshape(-1, u, w, config.grid, config.grid)
        yield Samples(
            prompts=rows.indices[: rows.valid],
            sample_numbers=columns.indices[: columns.valid],
            passes=passes[:, : rows.valid, : columns.valid],
            empty_code=config.codes,
        )


def last_pass(samples: Samples) -> Samples:
    """The finished grids alone."""
    return samples._replace(passes=samples.passes[-1:])


def passes_by_row(samples: Samples) -> Samples:
    """Splits a single pass into one for each row, from the top."""
    if len(samples.passes) > 1:
        return samples
    row = np.arange(samples.passes.shape[-1])[:, None]
    cut = [np.where(row <= last, samples.passes[0], samples.empty_code) for last in row[:, 0]]
    return samples._replace(passes=np.stack(cut))


def sample_in_parts(
    config: AnyPriorConfig,
    params: Any,
    text: Int[np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig,
    known: Int[np.ndarray, "B G G"] | None,
) -> Iterator[Int[np.ndarray, "F B G G"]]:
    """Samples a micro-batch in a few compiled calls, by the sampler of its prior and decoder.

    Returns:
      After each call the grids so far: of the progressive prior one for each of its passes since
      the call before, else one, with K in the cells that are not sampled yet.
    """
    if isinstance(config, ProgressiveConfig):
        for passes in progressive_sampler.sample_passes(
            config, params, text, keys, sampling=sampling, known=known
        ):
            yield np.asarray(passes)
        return
    if sampling.decoder == "jacobi" and isinstance(config, PriorConfig):
        codes, _ = jacobi_sampler.sample(config, params, text, keys, sampling=sampling, known=known)
        yield np.asarray(codes)[None]
        return
    prompt = top_rows(config, known)
    if isinstance(config, ImportedConfig):
        codes = imported_sampler.sample(config, params, text, keys, sampling=sampling, **prompt)
        yield np.asarray(codes)[None]
        return
    grids: Int[np.ndarray, "B G G"]
    grids = np.full((len(keys), config.grid, config.grid), config.codes, np.int32)
    row = 0
    for rows in autoregressive_sampler.sample_rows(
        config, params, text, keys, sampling=sampling, **prompt
    ):
        grids[:, row : row + rows.shape[1]] = rows
        row += rows.shape[1]
        yield grids[None].copy()


def top_rows(
    config: PriorConfig | ImportedConfig, known: Int[np.ndarray, "B G G"] | None
) -> dict[str, Any]:
    """What the autoregressive sampler takes for known cells; UserError unless they are top rows."""
    if known is None:
        return {}
    is_known = known < config.codes
    rows = int(is_known[0].all(axis=1).sum())
    if (is_known != (np.arange(config.grid) < rows)[:, None]).any():
        raise UserError(
            "the autoregressive decoder keeps only whole rows at the top; give these, or use "
            "the progressive decoder"
        )
    return {"prompt_codes": np.where(is_known, known, 0), "keep_rows": rows}


def bytes_each(config: AnyPriorConfig, sampling: SamplingConfig) -> int:
    """Memory that one image takes while it is sampled."""
    branches = 2 if sampling.guided else 1
    if isinstance(config, ProgressiveConfig):  # keys and values, and attention to all cells
        cached = 2 * config.depth * config.length * config.width
        attention = 2 * config.heads * config.image_length * config.length
        return 4 * (cached + attention) * branches
    if isinstance(config, ImportedConfig):  # keys and values of codes, and of the caption
        positions = config.image_length + config.text_slots
        depth = config.depth if isinstance(config, GPTConfig) else config.decoder_depth
        return 2 * 4 * config.width * depth * positions * branches
    if sampling.decoder == "jacobi":  # what is inside one layer, and the logits
        attention = 2 * config.heads * config.length**2  # at most, of a dense layer
        layer = (4 + config.mlp_ratio) * config.length * config.width
        return 4 * (attention + layer + 4 * config.image_length * config.codes) * branches
    plans = (layout(kind, grid=config.grid, kernel=config.kernel) for kind in config.kinds)
    slots = sum((plan.lane.max() + 1) * plan.seen.shape[1] for plan in plans)
    text = config.depth * config.text_length  # as if each image had a caption of its own
    return int(2 * 4 * config.width * (slots + text) * branches)  # keys and values in float32


def check_request(prompts: Sequence[str], *, n: int, seed: int) -> None:
    """Raises UserError for a request that no prior can serve."""
    if not prompts:
        raise UserError("no caption was given; give at least one")
    for i, prompt in enumerate(prompts, 1):
        if not normalize_caption(prompt):
            raise UserError(f"caption {i} of {len(prompts)} is empty; describe an image")
    if n < 1:
        raise UserError(f"n is {n}; at least 1 image per caption can be generated")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to {2**32 - 1}")


def caption_hash(prompt: str) -> int:
    """Of a normalized caption, whose case does not count."""
    return zlib.crc32(prompt.lower().encode("utf-8", "replace"))


@jax.jit
def image_keys(
    seeds: UInt32[Array | np.ndarray, " B"],
    hashes: UInt32[Array | np.ndarray, " B"],
    sample_numbers: UInt32[Array | np.ndarray, " B"],
) -> Key[Array, " B"]:
    """One key per image, from seed, hash of its caption and sample number alone."""
    keys = jax.vmap(jax.random.key)(seeds)
    for numbers in (hashes, sample_numbers):
        keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    return keys
