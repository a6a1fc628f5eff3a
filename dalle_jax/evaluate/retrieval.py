"""Whether a sample shows what its caption says: its true image is the nearest of all.

Letters: M captions, n images of each, A true images of all splits, R image side. Source: ours.
"""

import collections
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from dalle_jax.data.paraphrase import official_names, styled_caption
from dalle_jax.data.sources import DataSource
from dalle_jax.evaluate.composition import Judge, interval, nearest_captions
from dalle_jax.evaluate.image_sets import sampled_images, stack_images
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.evaluate.studies import clip_scores
from dalle_jax.evaluate.suites import decode_images
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

GROUPS = {"train": "seen", "heldout_cell": "held-out cell", "heldout_style": "held-out style"}
"""Splits of the emoji that captions are taken from, and what they are called in the table."""
STYLE = "twemoji"
FREE_FORM = Path(__file__).with_name("free_form.csv")
"""Captions that training never had, and the names of the emoji that they mean."""
BLOCK = 64  # images that are compared at a time

NOTE = (
    "An image is right if, of the true images of all splits and both styles, none is nearer in its "
    "pixels (mean squared difference) than the one its caption belongs to. Best of n: the image "
    "that the model's CLIP scores highest. Reconstructions: the true images encoded and decoded, "
    "which no sample can surpass. Nearest caption: the training image that retrieval would show. "
    "Shares with 95 % intervals over captions. Free-form captions, as people type them, name no "
    "style, so both styles are right."
)


def retrieval_study(
    model: Model,
    open_split: Callable[[str], DataSource],
    *,
    sampling: SamplingConfig,
    n: int,
    captions: int | None,
    seed: int,
    cache: ResultCache,
    reranker: Judge | None,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Samples n images for captions of each group and looks for the nearest true image.

    Args:
      model: trained on the emoji's training split alone.
      open_split: gives a split of the emoji by name.
      sampling: how to sample.
      n: images of each caption.
      captions: of each group, chosen by `seed`; None for all.
      seed: of the choice and of the sampling.
      cache: for samples.
      reranker: chooses the best of n; None to leave that out.
      progress: called with the captions sampled so far and in all.
    Returns:
      Rows of a table, the shares as [mean, lower end, upper end].
    """
    sources = {split: open_split(split) for split in (*GROUPS, "validation")}
    splits = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
    records = [record for found in splits.values() for record in found]
    true = decode_images([record["image"] for record in records], model.px)
    known = [record["captions"] for record in splits["train"]]
    groups = [_group(split, records, splits[split], captions, seed) for split in GROUPS]
    groups.append(_free_form(records, captions))
    total, done, rows = sum(len(group.captions) for group in groups), 0, []
    for group in groups:
        batches = list(sampled_images(model, group.captions, sampling, n=n, seed=seed, cache=cache))
        images = stack_images(batches, lambda part, before=done: progress(before + part, total))
        done += len(group.captions)
        found = {"samples": group.is_right(nearest(images, true))}
        if reranker is not None and n > 1:
            best = clip_scores(reranker, batches, group.captions).argmax(axis=1)
            found[f"best of {n}"] = np.take_along_axis(found["samples"], best[:, None], axis=1)
        if group.title in GROUPS.values():
            own = true[[min(right) for right in group.right]]
            reconstructed = model.decode(model.encode(own))
            found["reconstructions"] = group.is_right(nearest(reconstructed[:, None], true))
        if group.title != GROUPS["train"]:
            retrieved = true[nearest_captions(group.captions, known)]  # training comes first
            found["nearest caption"] = group.is_right(nearest(retrieved[:, None], true))
        rows += [
            {
                "captions": f"{len(group.captions)} {group.title}",
                "images": kind,
                "right": list(interval(right.astype(float))),
            }
            for kind, right in found.items()
        ]
    return rows


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Captions, and for each the true images that are right."""

    title: str
    captions: list[str]
    right: list[set[int]]

    def is_right(self, found: Int[np.ndarray, "M n"]) -> Bool[np.ndarray, "M n"]:
        pairs = zip(found, self.right, strict=True)
        return np.array([[i in right for i in row] for row, right in pairs])


def _group(split, records, own, captions, seed) -> _Group:
    """Some of a split's images of one style, by the caption that names both."""
    numbers = {record["id"]: i for i, record in enumerate(records)}
    own = [record for record in own if record["style"] == STYLE]
    some = [own[i] for i in np.random.default_rng(seed).permutation(len(own))[:captions]]
    return _Group(
        title=GROUPS[split],
        captions=[styled_caption(record["captions"][0], STYLE) for record in some],
        right=[{numbers[record["id"]]} for record in some],
    )


def _free_form(records, captions) -> _Group:
    """Captions as people type them; any image of one of the names is right, in either style."""
    with FREE_FORM.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))[:captions]
    named = collections.defaultdict(set)
    for i, record in enumerate(records):
        for name in official_names(record):
            named[name].add(i)
    return _Group(
        title="free-form",
        captions=[line["caption"] for line in lines],
        right=[set().union(*(named[name] for name in line["names"].split("|"))) for line in lines],
    )


def nearest(
    images: UInt8[np.ndarray, "M n R R 3"], true: UInt8[np.ndarray, "A R R 3"]
) -> Int[np.ndarray, "M n"]:
    """Finds for each image the true image with the smallest mean squared difference.

    Args:
      images: n of each caption.
      true: every true image.
    """
    M, n = images.shape[:2]
    flat, table = images.reshape(M * n, -1), true.reshape(len(true), -1)
    blocks = [slice(i, i + BLOCK) for i in range(0, len(true), BLOCK)]
    squares = [(table[block].astype(np.float32) ** 2).sum(1) for block in blocks]
    found = np.empty(M * n, int)
    for start in range(0, M * n, BLOCK):
        some = flat[start : start + BLOCK].astype(np.float32)
        apart = [  # without the images' own squares, which change no order
            square - 2 * some @ table[block].astype(np.float32).T
            for square, block in zip(squares, blocks, strict=True)
        ]
        found[start : start + BLOCK] = np.concatenate(apart, axis=1).argmin(1)
    return found.reshape(M, n)
