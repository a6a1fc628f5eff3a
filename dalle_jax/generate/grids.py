"""Grids of codes for captions: numbers every picture and draws them in batches that fit memory.

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
from dalle_jax.generate import autoregressive, progressive
from dalle_jax.generate.batching import rectangles
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.kv_cache import layout
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.caption import normalize_caption


class Drawn(NamedTuple):
    """Some of the pictures that were asked for."""

    prompts: Int[np.ndarray, " U"]
    """Which captions."""
    numbers: Int[np.ndarray, " W"]
    """Which samples of each of these."""
    passes: Int[np.ndarray, "F U W G G"]
    """Codes after each pass over the grid; one alone for a prior that goes through it once."""
    empty: int
    """K."""


def draw_grids(
    config: PriorConfig | ProgressiveConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    n: int,
    seed: int,
    sampling: SamplingConfig = SamplingConfig(),
    given: Int[np.ndarray, "#n G G"] | None = None,
) -> Iterator[Drawn]:
    """Draws n grids for each caption, some at a time.

    Args:
      config: sizes of a prior of either kind.
      params: its weights.
      tokenizer: belongs to it.
      prompts: captions; white space around them does not count, as in training, and those too long
        for the prior are cut, as there, which the log says.
      n: pictures of each.
      seed: in [0, 2**32). A grid depends on seed, caption and its number alone.
      sampling: how to sample; the decoder is that of the prior.
      given: for each number, or once for all, codes of cells that are kept, K in the others. In the
        autoregressive style these have to be whole rows at the top, as many for each.
    Raises:
      UserError: if something asked for is out of its range.
    """
    check_request(prompts, n=n, seed=seed)
    if given is not None:
        given = np.broadcast_to(given, (n, *given.shape[1:]))
    prompts = [normalize_caption(prompt) for prompt in prompts]
    text = tokenizer.encode(prompts, length=config.text_length - 1)
    hashes = [zlib.crc32(prompt.lower().encode("utf-8", "replace")) for prompt in prompts]
    hashes = np.asarray(hashes, np.uint32)
    for rows, columns in rectangles(len(prompts), n, _bytes_each(config, sampling.guidance)):
        u, w = len(rows.indices), len(columns.indices)
        keys = _keys(np.uint32(seed), hashes[rows.indices], columns.indices.astype(np.uint32))
        start = None if given is None else np.concatenate([given[columns.indices]] * u)
        passes = _sample(config, params, text[rows.indices], keys, start, sampling)
        passes = np.asarray(passes).reshape(-1, u, w, config.grid, config.grid)
        yield Drawn(
            prompts=rows.indices[: rows.new],
            numbers=columns.indices[: columns.new],
            passes=passes[:, : rows.new, : columns.new],
            empty=config.codes,
        )


def finished(drawn: Drawn) -> Drawn:
    """The last pass alone."""
    return drawn._replace(passes=drawn.passes[-1:])


def row_by_row(drawn: Drawn) -> Drawn:
    """In place of a single pass one for each row that it went through, from the top."""
    if len(drawn.passes) > 1:
        return drawn
    row = np.arange(drawn.passes.shape[-1])[:, None]
    cut = [np.where(row <= last, drawn.passes[0], drawn.empty) for last in row[:, 0]]
    return drawn._replace(passes=np.stack(cut))


def _sample(config, params, text, keys, given, sampling):
    if isinstance(config, ProgressiveConfig):
        return progressive.sample(config, params, text, keys, sampling=sampling, given=given)
    prompt = {}
    if given is not None:
        kept = given < config.codes
        rows = int(kept[0].all(axis=1).sum())
        if (kept != (np.arange(config.grid) < rows)[:, None]).any():
            raise UserError(
                "the autoregressive decoder keeps whole rows at the top alone; give these, or draw "
                "with the progressive one"
            )
        prompt = {"prompt_codes": np.where(kept, given, 0), "keep_rows": rows}
    return autoregressive.sample(config, params, text, keys, sampling=sampling, **prompt)[None]


def _bytes_each(config, guidance):
    branches = 1 if guidance == 1 else 2
    if isinstance(config, ProgressiveConfig):  # keys and values, and attention to all cells
        cached = 2 * config.depth * config.length * config.width
        attention = 2 * config.heads * config.image_length * config.length
        return 4 * (cached + attention) * branches
    plans = (layout(kind, grid=config.grid, kernel=config.kernel) for kind in config.kinds)
    slots = sum((plan.lane.max() + 1) * plan.seen.shape[1] for plan in plans)
    text = config.depth * config.text_length  # as if each picture had a caption of its own
    return int(2 * 4 * config.width * (slots + text) * branches)  # keys and values in float32


def check_request(prompts: Sequence[str], *, n: int, seed: int) -> None:
    """Raises UserError for what cannot be drawn by any prior."""
    if not prompts:
        raise UserError("no caption was given; give at least one")
    for i, prompt in enumerate(prompts, 1):
        if not normalize_caption(prompt):
            raise UserError(f"caption {i} of {len(prompts)} is empty; say what to draw")
    if n < 1:
        raise UserError(f"n is {n}; at least 1 image per caption can be generated")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to {2**32 - 1}")


@jax.jit
def _keys(
    seed: UInt32[Array, ""], hashes: UInt32[Array, " U"], numbers: UInt32[Array, " W"]
) -> Key[Array, " pictures"]:
    """One key a picture, from seed, hash of its caption and number alone, caption by caption."""
    of_caption = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), hashes)
    of_picture = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return of_picture(of_caption, numbers).ravel()
