"""Sets of images to measure, in lazy batches: sampled from a model, or real.

Letters: M captions, n images of each, B images of a batch, R pixel side.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from dalle_jax.evaluate.result_cache import ResultCache, digest
from dalle_jax.evaluate.suites import Suite, digest_of
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

BATCH = 32  # images that are sampled or read at a time, and cached in one file


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Some images of a set, which are made or read when they are asked for.

    Attributes:
      rows: their indices in the set.
      key: identifies them in the cache.
      images: returns uint8 [B, R, R, 3], or [B, n, R, R, 3] of captions with n images each.
    """

    rows: Int[np.ndarray, " B"]
    key: str
    images: Callable[[], UInt8[np.ndarray, "B ..."]]


def sampled_images(
    model: Model,
    captions: Sequence[str],
    sampling: SamplingConfig,
    *,
    n: int,
    seed: int,
    cache: ResultCache,
) -> Iterator[ImageBatch]:
    """Generates n images for each caption; images in the cache are read.

    A caption that is repeated gets other images: the k-th repetition is sampled with seed + k.

    Returns:
      Batches whose images are uint8 [B, n, R, R, 3].
    """
    seen = collections.Counter()
    repetitions = collections.defaultdict(list)  # how often a caption came before: rows
    for row, caption in enumerate(captions):
        repetitions[seen[caption]].append(row)
        seen[caption] += 1
    for repetition, rows in repetitions.items():
        size = max(1, BATCH // n)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            key = {
                "model": model.fingerprints,
                "prompts": [captions[row] for row in some],
                "n": n,
                "seed": (seed + repetition) % 2**32,
                "sampling": dataclasses.asdict(sampling),
            }
            images = functools.partial(_generate, model, sampling, cache, key)
            yield ImageBatch(rows=np.asarray(some), key=digest(key), images=images)


def _generate(model, sampling, cache, key):
    def compute():
        images = model.generate(key["prompts"], n=key["n"], seed=key["seed"], sampling=sampling)
        return {"images": images}

    return cache.get(key, compute)["images"]


def first_of_each(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    """The first image of each caption."""
    for batch in batches:
        yield dataclasses.replace(batch, images=lambda batch=batch: batch.images()[:, 0])


def real_images(suite: Suite, records: Sequence[int], px: int) -> Iterator[ImageBatch]:
    """The images of records."""
    for start in range(0, len(records), BATCH):
        rows = np.arange(start, min(start + BATCH, len(records)))
        images = functools.partial(suite.images, [records[row] for row in rows], px)
        yield ImageBatch(rows=rows, key=digest_of(images()), images=images)


def reconstructions(model: Model, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    """The images encoded and decoded by the model's codec, which no sample can surpass."""
    for batch in batches:
        key = digest({"codec": model.codec_fingerprint, "images": batch.key})

        def images(batch=batch):
            return model.decode(model.encode(batch.images()))

        yield ImageBatch(rows=batch.rows, key=key, images=images)


def stack_images(
    batches: Iterable[ImageBatch], progress: Callable[[int], None] = lambda done: None
) -> UInt8[np.ndarray, "M ..."]:
    """All images of a set in one array, in the order of their rows.

    Args:
      batches: of the set.
      progress: called after each batch with the rows so far.
    """
    rows, images = [], []
    for batch in batches:
        rows.append(batch.rows)
        images.append(batch.images())
        progress(sum(map(len, rows)))
    return np.concatenate(images)[np.argsort(np.concatenate(rows))]
