"""Which held-out images training has seen, nearly: near-duplicates of two sets.

Images are near if their features are. How near is near enough is learned from labelled pairs: a
held-out image and a changed copy of it are the same, that copy and the nearest other held-out
image are not. The threshold is the one that mistakes the smallest share of both. What it finds is
to be looked at.

Letters: S training images, M held-out images, E width of features.
Source: Ramesh et al. 2021, section 3.1; Radford et al. 2021, appendix C, for the changes.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from dalle_jax.data.sources import list_folder
from dalle_jax.errors import UserError
from dalle_jax.evaluate.result_cache import temporary_array
from dalle_jax.image.pixels import crop_center, decode
from dalle_jax.image.sheet import contact_sheet

PX = 224  # side that images are compared at
DETAIL = 64  # after a reduction to this, or an image and its small copy differ in sharpness
COPIES = 1000  # changed copies that the threshold is learned from
LEAST = 20  # held-out images that it takes: the nearest of few others is too far away
_BLOCK = 1024  # images of either set that are compared at a time

ImageArray = UInt8[np.ndarray, "H W 3"]
Embed = Callable[[UInt8[np.ndarray, "B R R 3"]], Float[np.ndarray, "B E"]]
Progress = Callable[[int, int], None]


class Pair(NamedTuple):
    """A held-out image and a training image that is nearly the same."""

    held_out: str
    training: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What was found.

    Attributes:
      training, held_out: number of images of each set.
      threshold: cosine from which on two images count as the same.
      missed: share of changed copies below it; None if the threshold was given.
      mistaken: share of those copies whose nearest other image is not below it; None as well.
      pairs: nearest first.
    """

    training: int
    held_out: int
    threshold: float
    missed: float | None
    mistaken: float | None
    pairs: list[Pair]

    @property
    def overlapping(self) -> list[str]:
        """Held-out images that training has seen."""
        return sorted({pair.held_out for pair in self.pairs})

    @property
    def remove(self) -> list[str]:
        """Training images to leave out."""
        return sorted({pair.training for pair in self.pairs})

    def write_remove_list(self, path: Path) -> None:
        """Writes the names of those, one a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(os.fsencode(name) + b"\n" for name in self.remove))

    def __str__(self) -> str:
        """Says the counts, and the first pairs by name."""
        share = 100 * len(self.overlapping) / self.held_out
        learned = ""
        if self.missed is not None:
            learned = (
                f" (that misses {100 * self.missed:.1f} % of changed copies and takes "
                f"{100 * self.mistaken:.1f} % of other images for one)"
            )
        lines = [
            f"{len(self.overlapping)} of {self.held_out} images ({share:.1f} %) are nearly in the "
            f"other {self.training}, at a cosine of {self.threshold:.4f}{learned}; "
            f"{len(self.remove)} of those are to be left out"
        ]
        lines += [f"  {p.similarity:.4f} {p.held_out} = {p.training}" for p in self.pairs[:20]]
        if len(self.pairs) > 20:
            lines.append(f"  ... and {len(self.pairs) - 20} more pairs")
        return "\n".join(lines)


class LazyImages(Sequence):
    """Named images of a set, squares of `PX` a side."""

    def __init__(self, names: Sequence[str], images: Sequence[Any]):
        self.names, self._images = names, images

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageArray:
        return crop_center(decode(self._images[index]), PX)


def open_images(name: str | os.PathLike) -> LazyImages:
    """Opens a folder of images, with or without captions, or a split as "emoji:train".

    Raises:
      SourceError: if there is no such folder or split.
    """
    kind, _, split = os.fspath(name).partition(":")
    if kind == "emoji":
        from dalle_jax.data.emoji import emoji_source

        source = emoji_source(split)
        records = [source[i] for i in range(len(source))]
        return LazyImages([r["id"] for r in records], [r["image"] for r in records])
    root = Path(name)
    names = list(list_folder(root).captions)
    return LazyImages(names, [root / name for name in names])


def find_overlap(
    training: LazyImages,
    held_out: LazyImages,
    embed: Embed,
    *,
    threshold: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Overlap:
    """Finds the pairs of a held-out and a training image that are nearly the same.

    Features are taken relative to their mean over training, without which all images of a kind
    (drawings on white) are alike.

    Args:
      training: the images of which some may have to go.
      held_out: the images that should be new.
      embed: gives features.
      threshold: least cosine of a pair; None to learn it from changed copies.
      seed: of those copies.
      progress: called with images done and in all.
    Raises:
      UserError: if the threshold is not a cosine, or there are too few images to learn one from.
    """
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"the threshold is {threshold}; it is a cosine and lies in [-1, 1]")
    if threshold is None and len(held_out) < LEAST:
        raise UserError(
            f"{len(held_out)} held-out images are too few to learn a threshold from, which takes "
            f"{LEAST}; give one with --threshold, a cosine such as 0.9, and look at what it finds"
        )
    rng = np.random.default_rng(seed)
    originals = rng.integers(len(held_out), size=0 if threshold is not None else COPIES)
    total = len(training) + len(held_out) + len(originals)
    done = 0

    def features(images: Iterable[ImageArray], count: int) -> np.ndarray:
        nonlocal done
        found, start = None, 0
        for batch in _batched(images):
            squares = [crop_center(crop_center(image, DETAIL), PX) for image in batch]
            part = np.asarray(embed(np.stack(squares)), np.float32)
            if found is None:
                found = temporary_array(count, part.shape[1])
            found[start : start + len(part)] = part
            start += len(part)
            done += len(part)
            if progress is not None:
                progress(done, total)
        return found

    seen, new = features(training, len(training)), features(held_out, len(held_out))
    mean = seen.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    _make_units(seen, mean)
    _make_units(new, mean)
    missed = mistaken = None
    if threshold is None:
        copies = features((changed(held_out[int(i)], rng) for i in originals), len(originals))
        _make_units(copies, mean)
        threshold, missed, mistaken = _learned(copies, new, originals)
    pairs = [
        Pair(held_out.names[m], training.names[s], similarity)
        for m, s, similarity in _near(new, seen, threshold)
    ]
    pairs.sort(key=lambda pair: (-pair.similarity, pair.held_out, pair.training))
    return Overlap(
        training=len(training),
        held_out=len(held_out),
        threshold=threshold,
        missed=missed,
        mistaken=mistaken,
        pairs=pairs,
    )


def _learned(copies, new, originals) -> tuple[float, float, float]:
    """The threshold that mistakes least, the share of same pairs below it, of others not below."""
    same, other = np.empty(len(copies)), np.full(len(copies), -1.0)
    for start in range(0, len(new), _BLOCK):
        similar = copies @ new[start : start + _BLOCK].T
        own = start + np.arange(similar.shape[1]) == originals[:, None]
        same[own.any(axis=1)] = similar[own]
        other = np.maximum(other, np.where(own, -1, similar).max(axis=1))
    candidates = np.sort(np.concatenate([same, other]))
    missed = np.searchsorted(np.sort(same), candidates) / len(same)
    mistaken = 1 - np.searchsorted(np.sort(other), candidates) / len(other)
    best = (missed + mistaken).argmin()
    return float(candidates[best]), float(missed[best]), float(mistaken[best])


def changed(image: ImageArray, rng: np.random.Generator) -> UInt8[np.ndarray, "R R 3"]:
    """A copy that people would call the same image, [PX, PX, 3].

    Each change is made half of the time, at least one: a crop to 80 % of the sides or more, sides
    stretched by up to 15 %, reduced to half and more by any of four resizings, turned by up to 5
    degrees, JPEG of quality 30 to 95, hue turned by up to 7 degrees and saturation and value
    scaled by up to 15 %.
    """
    changes = [_crop, _stretch, _reduce, _turn, _compress, _jitter]
    chosen = rng.random(len(changes)) < 0.5
    chosen[rng.integers(len(changes))] = True
    copy = Image.fromarray(image)
    for change in [change for change, made in zip(changes, chosen, strict=True) if made]:
        copy = change(copy, rng)
    return crop_center(np.array(copy.convert("RGB")), PX)


def _crop(image, rng):
    share = rng.uniform(0.8, 1)
    wide, high = (max(1, round(share * side)) for side in image.size)
    left, top = rng.integers(image.width - wide + 1), rng.integers(image.height - high + 1)
    return image.crop((left, top, left + wide, top + high))


def _stretch(image, rng):
    wide = max(1, round(image.width * np.exp(rng.uniform(-0.14, 0.14))))
    stretched = image.resize((wide, image.height), Image.Resampling.BICUBIC)
    side = max(stretched.size)
    return ImageOps.pad(stretched, (side, side), color=image.getpixel((0, 0)))


def _reduce(image, rng):
    kinds = [
        getattr(Image.Resampling, kind) for kind in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")
    ]
    share = rng.uniform(0.5, 1)
    size = [max(1, round(share * side)) for side in image.size]
    return image.resize(size, kinds[rng.integers(4)])


def _turn(image, rng):
    angle, corner = rng.uniform(-5, 5), image.getpixel((0, 0))
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=corner)


def _compress(image, rng):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(30, 96)))
    return Image.open(buffer).convert("RGB")


def _jitter(image, rng):
    hsv = np.array(image.convert("HSV")).astype(float)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-5, 5)) % 256
    hsv[..., 1:] *= rng.uniform(0.85, 1.15, size=2)
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")


def _batched(images: Iterable[ImageArray]) -> Iterator[list[ImageArray]]:
    waiting = iter(images)
    while batch := list(itertools.islice(waiting, 16)):
        yield batch


def _make_units(features, mean) -> None:
    """Takes the mean from features and gives them the length 1, in their place."""
    for start in range(0, len(features), _BLOCK):
        part = features[start : start + _BLOCK] - mean
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        features[start : start + _BLOCK] = part


def _near(new, seen, threshold) -> Iterator[tuple[int, int, float]]:
    """Every pair from the threshold on, blockwise."""
    for start in range(0, len(new), _BLOCK):
        for other in range(0, len(seen), _BLOCK):
            similar = new[start : start + _BLOCK] @ seen[other : other + _BLOCK].T
            for m, s in zip(*np.nonzero(similar >= threshold), strict=True):
                yield start + int(m), other + int(s), float(similar[m, s])


def sheet(
    overlap: Overlap, training: LazyImages, held_out: LazyImages, *, count: int = 16
) -> ImageArray:
    """The least similar pairs, where the threshold decides: held-out above, training below."""
    places = [{name: i for i, name in enumerate(of.names)} for of in (held_out, training)]
    shown = overlap.pairs[-count:]
    above = np.stack([held_out[places[0][pair.held_out]] for pair in shown])
    below = np.stack([training[places[1][pair.training]] for pair in shown])
    labels = [f"held out, cosine {shown[0].similarity:.4f} down to {shown[-1].similarity:.4f}"]
    return contact_sheet(np.stack([above, below])[:, :, ::2, ::2], [*labels, "training"])
