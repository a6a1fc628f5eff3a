"""Pictures to be measured, in parts: drawn ones, kept on disk, and real ones.

Letters: M captions, n pictures of each, B pictures of a part, R pixel side.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from dalle_jax.evaluate.kept import Kept, digest
from dalle_jax.evaluate.suites import Suite, digest_of
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

PART = 32  # pictures that are drawn, or read, between two looks at the disk


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some pictures of a set, which are not there before they are asked for.

    Attributes:
      rows: their places in the set.
      key: what they are known by on disk.
      images: gives uint8 [B, R, R, 3], or [B, n, R, R, 3] of captions with n pictures each.
    """

    rows: Int[np.ndarray, " B"]
    key: str
    images: Callable[[], UInt8[np.ndarray, "B ..."]]


def drawn(
    model: Model,
    captions: Sequence[str],
    sampling: SamplingConfig,
    *,
    n: int,
    seed: int,
    kept: Kept,
) -> Iterator[Part]:
    """Draws n pictures for each caption; what is on disk is not drawn again.

    A caption that comes again gets other pictures: the k-th time it is drawn with seed + k.

    Returns:
      Parts whose images are uint8 [B, n, R, R, 3].
    """
    times = collections.Counter()
    turns = collections.defaultdict(list)  # how often it came before: places
    for row, caption in enumerate(captions):
        turns[times[caption]].append(row)
        times[caption] += 1
    for turn, rows in turns.items():
        step = max(1, PART // n)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            question = {
                "drawn by": model.fingerprints,
                "prompts": [captions[row] for row in part],
                "n": n,
                "seed": (seed + turn) % 2**32,
                "sampling": dataclasses.asdict(sampling),
            }
            images = functools.partial(_images, model, kept, question)
            yield Part(rows=np.asarray(part), key=digest(question), images=images)


def _images(model, kept, question):
    options = {name: value for name, value in question.items() if name != "drawn by"}
    options["sampling"] = SamplingConfig(**options["sampling"])
    return kept.arrays(question, lambda: {"images": model.generate(**options)})["images"]


def singles(parts: Iterable[Part]) -> Iterator[Part]:
    """The first picture of each caption."""
    for part in parts:
        yield dataclasses.replace(part, images=lambda part=part: part.images()[:, 0])


def real(suite: Suite, records: Sequence[int], px: int) -> Iterator[Part]:
    """Pictures of records, in parts."""
    for start in range(0, len(records), PART):
        rows = np.arange(start, min(start + PART, len(records)))
        images = functools.partial(suite.pictures, [records[row] for row in rows], px)
        yield Part(rows=rows, key=digest_of(images()), images=images)  # read again when needed


def decoded(model: Model, parts: Iterable[Part]) -> Iterator[Part]:
    """The pictures as the model's tokenizer shows them, which no drawing can surpass."""
    for part in parts:
        key = digest({"decoded by": model.codec_fingerprint, "pictures": part.key})

        def images(part=part):
            return model.decode(model.encode(part.images()))

        yield Part(rows=part.rows, key=key, images=images)


def gathered(parts: Iterable[Part]) -> UInt8[np.ndarray, "M ..."]:
    """All pictures of a set at once, each in its place."""
    found = [(part.rows, part.images()) for part in parts]
    rows, images = zip(*found, strict=True)
    return np.concatenate(images)[np.argsort(np.concatenate(rows))]
