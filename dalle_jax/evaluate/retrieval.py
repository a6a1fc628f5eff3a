"""Whether a sampled image shows what its caption says: its own true image is the nearest of all.

Letters: M captions, n images of each, A true images of all splits, R image side. Source: ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dalle_jax.data.sources import DataSource
from dalle_jax.evaluate.composition import Judge, interval, nearest_captions
from dalle_jax.evaluate.drawing import Sampling, drawn, gathered
from dalle_jax.evaluate.kept import Kept
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import crop_center, decode

GROUPS = {"train": "seen", "heldout_cell": "held-out cell", "heldout_style": "held-out style"}
"""Splits of the emoji that captions are taken from, and what they are called in the table."""
STYLE = "twemoji"
BLOCK = 64  # images that are compared at a time

NOTE = (
    "An image is right if, of the true images of all splits and both styles, none is nearer in its "
    "pixels (mean squared difference) than the one its caption belongs to. Best of n: the image "
    "that the model's CLIP scores highest. Decoded: the true image through the tokenizer, which no "
    "sample can surpass. Nearest caption: the training image that retrieval would show. Shares "
    "with 95 % intervals over captions."
)


def retrieval_study(
    model: Model,
    open_split: Callable[[str], DataSource],
    *,
    sampling: Sampling,
    n: int,
    captions: int | None,
    seed: int,
    kept: Kept,
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
      kept: where sampled images are cached.
      reranker: chooses the best of n; None to leave that out.
      progress: called with the captions sampled so far and in all.
    Returns:
      Rows of a table, the shares as [mean, lower end, upper end].
    """
    splits = {split: _records(open_split(split)) for split in (*GROUPS, "validation")}
    records = [record for found in splits.values() for record in found]
    true = np.stack([crop_center(decode(record["image"]), model.px) for record in records])
    numbers = {record["id"]: i for i, record in enumerate(records)}
    rng = np.random.default_rng(seed)
    chosen = {}
    for split in GROUPS:
        found = [record for record in splits[split] if record["style"] == STYLE]
        chosen[split] = [found[i] for i in rng.permutation(len(found))[:captions]]
    total, done, rows = sum(map(len, chosen.values())), 0, []
    known = [record["captions"] for record in splits["train"]]
    for split, some in chosen.items():
        wanted = [f"{record['captions'][0]}, {STYLE} style" for record in some]
        own = np.array([numbers[record["id"]] for record in some])
        parts = []
        for part in drawn(model, wanted, sampling, n=n, seed=seed, kept=kept):
            part.images()
            parts.append(part)
            done += len(part.rows)
            progress(done, total)
        images = gathered(parts)
        found = {"sampled": is_nearest(images, true, own)}
        if reranker is not None and n > 1:
            best = _best(reranker, images, wanted)
            found[f"best of {n}"] = np.take_along_axis(found["sampled"], best[:, None], axis=1)
        through = model.decode(model.encode(true[own]))
        found["decoded"] = is_nearest(through[:, None], true, own)
        if split != "train":
            retrieved = true[nearest_captions(wanted, known)]
            found["nearest caption"] = is_nearest(retrieved[:, None], true, own)
        rows += [
            {"captions": f"{len(some)} {GROUPS[split]}", "images": kind, "right": list(share)}
            for kind, right in found.items()
            for share in [interval(right.astype(float))]
        ]
    return rows


def is_nearest(
    images: UInt8[np.ndarray, "M n R R 3"],
    true: UInt8[np.ndarray, "A R R 3"],
    own: Int[np.ndarray, " M"],
) -> np.ndarray:
    """Says of each image whether its own true image is the nearest of all; bool [M, n].

    Args:
      images: n of each caption.
      true: every true image.
      own: which of them belongs to each caption.
    """
    M, n = images.shape[:2]
    flat = images.reshape(M * n, -1)
    right = np.empty(M * n, bool)
    table = true.reshape(len(true), -1)
    squares = np.concatenate(
        [(table[i : i + BLOCK].astype(np.float32) ** 2).sum(1) for i in range(0, len(true), BLOCK)]
    )
    for start in range(0, M * n, BLOCK):
        some = flat[start : start + BLOCK].astype(np.float32)
        apart = np.concatenate(
            [
                squares[i : i + BLOCK] - 2 * some @ table[i : i + BLOCK].astype(np.float32).T
                for i in range(0, len(true), BLOCK)
            ],
            axis=1,
        )  # without the images' own squares, which change no order
        right[start : start + BLOCK] = apart.argmin(1) == np.repeat(own, n)[start : start + BLOCK]
    return right.reshape(M, n)


def _best(reranker: Judge, images, captions: Sequence[str]) -> Int[np.ndarray, " M"]:
    texts = np.asarray(reranker.texts(list(captions)))
    scores = [
        np.asarray(reranker.images(some)) @ text for some, text in zip(images, texts, strict=True)
    ]
    return np.stack(scores).argmax(1)


def _records(source: DataSource) -> list[dict]:
    return [source[i] for i in range(len(source))]
