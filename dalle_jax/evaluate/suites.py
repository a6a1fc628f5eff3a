"""Suites: captions to generate images for, and real images to compare them with."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dalle_jax.data.sources import DataSource, FolderSource, SourceError
from dalle_jax.extras import require
from dalle_jax.image.pixels import crop_center, decode

COCO_CAPTIONS = 30_000
NAMES = ("emoji", "coco", "cub", "folder")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Captions in random order, and real images.

    Attributes:
      name: shown to people.
      source: records with images.
      captions: to generate images for.
      truth: for each caption the record that it belongs to.
      families: for each caption its kind, such as a style.
      real: the records whose images samples are compared with.
    """

    name: str
    source: DataSource
    captions: tuple[str, ...]
    truth: tuple[int, ...]
    families: tuple[str, ...]
    real: tuple[int, ...]

    def head(self, count: int | None) -> "Suite":
        """The same with the first captions only, all of them if there are fewer."""
        parts = {field: getattr(self, field)[:count] for field in ("captions", "truth", "families")}
        return Suite(name=self.name, source=self.source, real=self.real, **parts)

    def images(self, records: Sequence[int], px: int) -> UInt8[np.ndarray, "B R R 3"]:
        """Images of records, see `decode_images`."""
        return decode_images([self.source[i]["image"] for i in records], px)


def decode_images(
    files: Sequence[bytes | str | os.PathLike], px: int
) -> UInt8[np.ndarray, "B R R 3"]:
    """Decodes images, as bytes or by path: short side scaled to `px` (Lanczos), middle square."""
    return np.stack([crop_center(decode(file), px) for file in files])


def open_suite(
    name: str,
    *,
    data: str | os.PathLike | None = None,
    split: str | None = None,
    px: int = 64,
    seed: int = 0,
) -> Suite:
    """Opens a suite by its name.

    Args:
      name: "emoji": the first caption of each emoji whose concept training never saw. "coco":
        30,000 random captions of the set. "cub": every caption once. "folder": the first caption
        of each image.
      data: for all but the emoji a folder of captioned images, see `data.sources`, or one that
        TensorFlow Datasets prepared, see `data.prepared`.
      split: of the data; None for all of a folder, "validation" of COCO and of the emoji, "test"
        of CUB.
      px: side that the emoji are rendered at, in pixels.
      seed: of the order of captions.
    Raises:
      SourceError: if there is no such suite, or its data is missing or holds nothing.
    Source: Ramesh et al. 2021, section 3.1 and appendix C, for COCO and CUB; the rest is ours.
    """
    if name not in NAMES:
        raise SourceError(f"there is no suite {name!r}; choose from {', '.join(NAMES)}")
    if name == "emoji":
        if data is not None:
            raise SourceError("the emoji need no --data; choose --suite folder for your images")
        source = open_emoji(split or "validation", px=px)
    elif data is None:
        raise SourceError(f"suite {name} needs --data: the folder that holds its images")
    else:
        source = _open(Path(data), split, {"coco": "validation", "cub": "test"}.get(name))

    records = [_without_image(source[i]) for i in range(len(source))]
    rows = list(_captions_with_records(name, records))
    order = np.random.default_rng(seed).permutation(len(rows))
    if name == "coco":
        order = order[:COCO_CAPTIONS]
    captions, truth = zip(*(rows[i] for i in order), strict=True)
    families = tuple(records[i].get("style", "all") for i in truth)
    return Suite(
        name=name,
        source=source,
        captions=captions,
        truth=truth,
        families=families,
        real=tuple(range(len(records))),
    )


def open_emoji(split: str, *, px: int) -> DataSource:
    """Opens a split of the emoji; see `data.emoji`, which takes a while to import."""
    require("emoji")
    from dalle_jax.data.emoji import emoji_source

    return emoji_source(split, px=px)


def _open(folder: Path, split: str | None, usual: str | None) -> DataSource:
    if (folder / "dataset_info.json").is_file():
        require("train")
        from dalle_jax.data.tfds_source import PreparedSource

        return PreparedSource(folder, split or usual or "validation")
    return FolderSource(folder, split=split)


def _without_image(record: dict) -> dict:
    """The rest of a record, which fits in memory."""
    return {name: value for name, value in record.items() if name != "image"}


def _captions_with_records(name: str, records: Sequence[dict]) -> Iterator[tuple[str, int]]:
    """Captions with the number of their record."""
    pairs = [(caption, i) for i, record in enumerate(records) for caption in record["captions"]]
    if name == "coco":
        yield from pairs
    elif name == "cub":
        yield from dict(reversed(pairs)).items()  # of equal captions the first record's
    else:
        yield from ((record["captions"][0], i) for i, record in enumerate(records))


def digest_of(images: UInt8[np.ndarray, "B R R 3"]) -> str:
    """A name for images by what they show."""
    head = repr(images.shape).encode()
    return hashlib.sha256(head + np.ascontiguousarray(images).tobytes()).hexdigest()[:32]
