"""Reranking: the best of many images by their CLIP scores.

Letters: U captions, R pixel side, E features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dalle_jax.generate.clip_scorer import Clip


class Ranked(NamedTuple):
    """The best images of each caption, best first."""

    images: UInt8[np.ndarray, "U keep R R 3"]
    scores: Float[np.ndarray, "U keep"]
    """Cosine similarities of image and caption, in [-1, 1]."""


class RunningBest:
    """The best images of each caption so far; only these are in memory.

    Args:
      captions: U of them.
      keep: images to keep for each.
      px: side R of the images.
      clip: scores how well an image fits its caption.
    """

    def __init__(self, captions: Sequence[str], *, keep: int, px: int, clip: Clip):
        U = len(captions)
        self._clip, self._texts, self._keep = clip, clip.encode_texts(captions), keep
        self._images: np.ndarray = np.zeros((U, keep, px, px, 3), np.uint8)
        self._scores: np.ndarray = np.full((U, keep), -np.inf, np.float32)

    def add(self, rows: Int[np.ndarray, " u"], images: UInt8[np.ndarray, "u w R R 3"]) -> None:
        """Scores w more images of each of some captions.

        Args:
          rows: indices of the captions, all different.
          images: their images; of equal scores the earlier image is kept.
        """
        u, w = images.shape[:2]
        seen = self._clip.encode_images(images.reshape(u * w, *images.shape[2:])).reshape(u, w, -1)
        scores = np.einsum("uE,uwE->uw", self._texts[rows], seen)
        scores = np.concatenate([self._scores[rows], scores], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._keep]
        self._scores[rows] = np.take_along_axis(scores, best, axis=1)
        images = np.concatenate([self._images[rows], images], axis=1)
        self._images[rows] = np.take_along_axis(images, best[..., None, None, None], axis=1)

    def ranked(self) -> Ranked:
        """The best of all images so far."""
        return Ranked(self._images, self._scores)
