"""Zero-shot composition: whether samples show what training never showed together.

A *case* is a caption whose true image was held out, and for each of its *axes* (style, role,
gender, tone ...) the captions that differ from it in that axis alone. An independent judge has to
rank the right one first. Beside it stand what could look like composition and is none: the training
image with the nearest caption, and how near training images come to the held-out one.

Letters: M cases, n images of a case, R pixel side, E features, S training images. Source: ours,
after the claims of Ramesh et al. 2021, section 3.3.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

RESAMPLES = 2_000  # of the cases, for each interval


@dataclass(frozen=True, kw_only=True)
class Case:
    """A caption, what else it could have been, and the image that is right."""

    id: str
    """Of the record that holds the true image."""
    family: str
    """Which kind of combination it is: cases of a family have the same axes."""
    held_out: bool
    """Whether training never saw the true image."""
    caption: str
    alternatives: dict[str, tuple[str, ...]]
    """For each axis the captions that are wrong in it alone."""


@runtime_checkable
class Judge(Protocol):
    """A contrastive model: unit features whose products are similarities."""

    def encode_images(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B E"]:
        """Features of images."""
        ...

    def encode_texts(self, captions: list[str]) -> Float[np.ndarray, "B E"]:
        """Features of captions."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the cases of a family, shown as images of one kind."""

    family: str
    held_out: bool
    images: str
    """samples; nearest caption: the training image that retrieval would show; reconstructions:
    the true images encoded and decoded, which no sample can surpass; or true."""
    cases: int
    values: dict[str, tuple[float, float, float]]
    """Mean, lower and upper end of its interval, for each axis and for nearness."""


def table(
    cases: Sequence[Case],
    samples: UInt8[np.ndarray, "M n R R 3"],
    *,
    truth: UInt8[np.ndarray, "M R R 3"],
    reconstructions: UInt8[np.ndarray, "M R R 3"],
    training: UInt8[np.ndarray, "S R R 3"],
    ids: Sequence[str],
    captions: Sequence[Sequence[str]],
    judge: Judge,
) -> list[Row]:
    """Measures all kinds of images of all cases.

    Args:
      cases: M cases.
      samples: n images for each caption.
      truth: the true image of each.
      reconstructions: the true images, encoded and decoded by the model.
      training: the images that training saw.
      ids: names of their records.
      captions: captions of each of them.
      judge: another model than the one that chose among the samples.
    Returns:
      Rows for the held-out and the seen cases of each family and for each kind of images. Seen
      cases have no nearest caption, since it is their own.
    """
    M, n = samples.shape[:2]
    numbers = {name: i for i, name in enumerate(ids)}
    own = np.asarray([-1 if case.held_out else numbers[case.id] for case in cases])
    known = judge.encode_images(training)
    true = judge.encode_images(truth)
    of_samples = judge.encode_images(samples.reshape(M * n, *samples.shape[2:]))
    nearest = nearest_captions([case.caption for case in cases], captions)
    kinds = {
        "samples": of_samples.reshape(M, n, -1),
        "nearest caption": known[nearest][:, None],
        "reconstructions": judge.encode_images(reconstructions)[:, None],
        "true": true[:, None],
    }
    rows = []
    for kind, features in kinds.items():
        values = verdicts(cases, features, judge.encode_texts)
        if kind != "true":
            values |= nearness(features, true, known, own)
        for family, held_out in dict.fromkeys((case.family, case.held_out) for case in cases):
            if kind == "nearest caption" and not held_out:
                continue
            chosen = [(c.family, c.held_out) == (family, held_out) for c in cases]
            means = {name: interval(value[chosen]) for name, value in values.items()}
            means = {name: mean for name, mean in means.items() if not math.isnan(mean[0])}
            rows.append(
                Row(
                    family=family,
                    held_out=held_out,
                    images=kind,
                    cases=sum(chosen),
                    values=means,
                )
            )
    return sorted(rows, key=lambda row: (row.family, not row.held_out))


def verdicts(
    cases: Sequence[Case],
    features: Float[np.ndarray, "M n E"],
    texts: Callable[[list[str]], Float[np.ndarray, "B E"]],
) -> dict[str, Float[np.ndarray, "M n"]]:
    """Asks for each axis whether the right caption ranks first, ties being wrong.

    Args:
      cases: M cases.
      features: the judge's, of n images for each case.
      texts: the judge's features of captions.
    Returns:
      For each axis, and for "all" axes of a case together, 1 for right and 0 for wrong; NaN for
      a case that has no such axis.
    """
    captions = sorted({c for case in cases for c in (case.caption, *_wrong(case))})
    place = {caption: i for i, caption in enumerate(captions)}
    known = texts(captions)
    axes = dict.fromkeys(axis for case in cases for axis in case.alternatives)
    right = {axis: np.full(features.shape[:2], np.nan) for axis in axes}
    right["all"] = np.ones(features.shape[:2])
    for m, case in enumerate(cases):
        similar = features[m] @ known[place[case.caption]]  # n
        for axis, others in case.alternatives.items():
            best = (features[m] @ known[[place[other] for other in others]].T).max(-1)
            right[axis][m] = similar > best
            right["all"][m] *= right[axis][m]
    return right


def chance(cases: Sequence[Case]) -> dict[str, float]:
    """What random guesses reach in each axis, and in all of them.

    >>> wrong = {"style": ("cat, flat",), "concept": ("dog, drawn", "cow, drawn")}
    >>> case = Case(id="1", family="f", held_out=True, caption="cat, drawn", alternatives=wrong)
    >>> {axis: round(share, 3) for axis, share in chance([case]).items()}
    {'style': 0.5, 'concept': 0.333, 'all': 0.167}
    """
    guesses = collections.defaultdict(list)
    for case in cases:
        shares = {axis: 1 / (1 + len(others)) for axis, others in case.alternatives.items()}
        for axis, share in {**shares, "all": math.prod(shares.values())}.items():
            guesses[axis].append(share)
    return {axis: float(np.mean(shares)) for axis, shares in guesses.items()}


def nearness(
    features: Float[np.ndarray, "M n E"],
    truth: Float[np.ndarray, "M E"],
    training: Float[np.ndarray, "S E"],
    own: Int[np.ndarray, " M"],
) -> dict[str, Float[np.ndarray, "M 1"]]:
    """How near the best of a case's images comes to the true one, by composition or memory.

    Args:
      features: of n images for each case.
      truth: of the true images.
      training: of all training images.
      own: which training image is the true one, left out of the comparison; -1 if none is.
    Returns:
      similarity: cosine of the true image and the nearest of the n;
      composed: 1 if that image is nearer to the true one than to any training image;
      beyond memory: 1 if it is nearer to the true one than any training image is.
    """
    to_truth = np.einsum("MnE,ME->Mn", features, truth)
    best = features[np.arange(len(features)), to_truth.argmax(1)]  # M E
    similarity = to_truth.max(1)
    nearest = {
        "similarity": similarity,
        "composed": similarity > _greatest(best, training, own),
        "beyond memory": similarity > _greatest(truth, training, own),
    }
    return {name: value.astype(float)[:, None] for name, value in nearest.items()}


def nearest_captions(
    wanted: Sequence[str], captions: Sequence[Sequence[str]]
) -> Int[np.ndarray, " M"]:
    """Finds for each wanted caption the record that has the most alike: what retrieval would show.

    Alike is the cosine of their sets of words, each word weighted by log(records / records with
    it), so that rare words count. The first of equals is taken.

    Args:
      wanted: M captions.
      captions: those of each record.
    Returns:
      Numbers of records.
    """
    texts = [(record, _words(text)) for record, own in enumerate(captions) for text in own]
    records = np.asarray([record for record, _ in texts])
    holders = collections.defaultdict(list)  # word: numbers of texts
    for i, (_, words) in enumerate(texts):
        for word in words:
            holders[word].append(i)
    weight = {
        word: math.log(1 + len(captions) / len({*records[who]})) ** 2
        for word, who in holders.items()
    }
    norm = np.asarray([math.sqrt(sum(weight[word] for word in words)) for _, words in texts])
    nearest = []
    for caption in wanted:
        alike = np.zeros(len(texts))
        for word in _words(caption) & holders.keys():
            alike[holders[word]] += weight[word]
        nearest.append(records[np.argmax(alike / np.maximum(norm, 1e-9))])
    return np.asarray(nearest)


def interval(
    values: Float[np.ndarray, "M n"], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean over the cases that have a value, and its bootstrap interval over cases.

    Images of a case are not independent, so whole cases are resampled.

    Args:
      values: numbers, or NaN for a case that has none.
      seed: of the resampling.
      level: share of the resampled means inside.
    Returns:
      Mean, lower and upper end; all NaN if no case has a value.
    """
    values = values[~np.isnan(values).any(1)].mean(1)
    if not len(values):
        return (math.nan,) * 3
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def _wrong(case):
    return [caption for others in case.alternatives.values() for caption in others]


def _greatest(features, training, own):
    similar = features @ training.T  # M S
    left_out = np.flatnonzero(own >= 0)
    similar[left_out, own[left_out]] = -np.inf
    return similar.max(1)


def _words(text):
    return set(re.findall(r"[^\s,]+", text.lower()))
