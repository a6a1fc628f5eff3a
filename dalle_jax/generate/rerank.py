"""The best of many pictures, of which only the best so far are kept.

Letters: U captions, R pixel side, E features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dalle_jax.generate.clip import Clip


class Ranked(NamedTuple):
    """The best pictures of each caption, best first."""

    images: UInt8[np.ndarray, "U keep R R 3"]
    scores: Float[np.ndarray, "U keep"]
    """Cosine similarities of picture and caption, in [-1, 1]."""


class Best:
    """Keeps the best pictures of each caption while others come and go.

    Args:
      captions: U of them.
      keep: pictures to keep for each.
      px: side R of the pictures.
      clip: says how well an image fits its caption.
    """

    def __init__(self, captions: Sequence[str], *, keep: int, px: int, clip: Clip):
        U = len(captions)
        self._clip, self._texts, self._keep = clip, clip.texts(captions), keep
        self._images = np.zeros((U, keep, px, px, 3), np.uint8)
        self._scores = np.full((U, keep), -np.inf, np.float32)

    def add(self, rows: Int[np.ndarray, " u"], images: UInt8[np.ndarray, "u w R R 3"]) -> None:
        """Looks at w more pictures of each of some captions.

        Args:
          rows: numbers of the captions, all different.
          images: their pictures; of equally good ones the first to come is kept.
        """
        u, w = images.shape[:2]
        seen = self._clip.images(images.reshape(u * w, *images.shape[2:])).reshape(u, w, -1)
        scores = np.einsum("uE,uwE->uw", self._texts[rows], seen)
        scores = np.concatenate([self._scores[rows], scores], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._keep]
        self._scores[rows] = np.take_along_axis(scores, best, axis=1)
        images = np.concatenate([self._images[rows], images], axis=1)
        self._images[rows] = np.take_along_axis(images, best[..., None, None, None], axis=1)

    def ranked(self) -> Ranked:
        """Gives the best of all pictures so far."""
        return Ranked(self._images, self._scores)
