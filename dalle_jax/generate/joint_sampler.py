"""Samples images of different requests in one batch.

Letters: B images, G grid side, K codebook. The code K stands for a cell that is not filled.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dalle_jax.generate.code_sampler import bytes_each, caption_hash, image_keys, sample_in_parts
from dalle_jax.generate.micro_batching import LARGEST, MEMORY
from dalle_jax.generate.part_checks import AnyPriorConfig
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.caption import normalize_caption


class ImageSpec(NamedTuple):
    """What one image depends on, besides the model and how it is sampled."""

    prompt: str
    """Its caption."""
    seed: int
    """In [0, 2**32)."""
    number: int
    """Which sample of this caption and seed it is, from 0."""
    known: Int[np.ndarray, "G G"] | None = None
    """Codes of the cells that are kept, K in the others."""


def sample_jointly(
    config: AnyPriorConfig,
    params: Any,
    tokenizer: Tokenizer,
    images: Sequence[ImageSpec],
    *,
    sampling: SamplingConfig,
) -> Iterator[Int[np.ndarray, "B G G"]]:
    """Samples B grids of codes; each is the one that `Model.generate` samples, up to rounding.

    Args:
      config: sizes of a prior of any kind.
      params: its weights.
      tokenizer: belongs to it.
      images: as many as one batch holds; all of them without known cells, or all with as many.
      sampling: how to sample all of them; the decoder is that of the prior.
    Returns:
      The grids after some stages each, or after some rows of the autoregressive decoder; the last
      ones hold no K.
    Raises:
      UserError: if something asked for is out of its range.
    """
    prompts = [normalize_caption(image.prompt) for image in images]
    text = tokenizer.encode(prompts, length=config.text_length - 1)
    keys = image_keys(
        np.array([image.seed for image in images], np.uint32),
        np.array([caption_hash(prompt) for prompt in prompts], np.uint32),
        np.array([image.number for image in images], np.uint32),
    )
    known = None if images[0].known is None else np.stack([image.known for image in images])
    for passes in sample_in_parts(config, params, text, keys, sampling=sampling, known=known):
        yield passes[-1]


def largest_batch(config: AnyPriorConfig, sampling: SamplingConfig) -> int:
    """Images that fit into a batch, at least 1."""
    return max(1, min(LARGEST, MEMORY // bytes_each(config, sampling)))
