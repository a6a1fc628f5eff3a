"""Features of images: what sets of images are compared by.

A network is a ruler: the name of a number says which one made it. FID, KID and IS without more are
Inception's, by the weights they are defined with; those of another network carry its name.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dalle_jax.evaluate import efficientnet, inception
from dalle_jax.weights.torch_file import read_torch

BATCH = 16  # images at a time, about 0.2 GB

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feature network with its weights.

    Attributes:
      name: "Inception" or "EfficientNet-Lite0".
      apply: parameters and uint8 [B, H, W, 3] to features [B, D] and class logits [B, C].
      params: its weights.
      prepare: one image, uint8 [R, R, 3], to the input of `apply`.
      fingerprint: of the weights, so that features of others are not mistaken for its own.
    """

    name: str
    apply: Callable[..., Any]
    params: Any
    prepare: Callable[[np.ndarray], np.ndarray]
    fingerprint: str

    def __call__(
        self, images: UInt8[np.ndarray, "N R R 3"], *, progress: Progress | None = None
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N C"]]:
        """Features and class logits, computed in batches."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [self.prepare(image) for image in images[start : start + BATCH]]
            filled = np.stack(batch + batch[-1:] * (BATCH - len(batch)))  # one shape to compile
            parts.append([np.asarray(part)[: len(batch)] for part in self._run(filled)])
            if progress is not None:
                progress(min(start + BATCH, len(images)), len(images))
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)

    def title(self, kind: str) -> str:
        """The exact name of a number: "FID" and "IS" are Inception's alone."""
        if self.name == "Inception":
            return kind
        return f"{'FD' if kind == 'FID' else kind} {self.name}"

    def _run(self, batch):
        return _compiled(self.apply)(self.params, batch)


def inception_network(path: str | os.PathLike) -> Network:
    """The network of FID and IS, with weights from a file of the user.

    Images larger than 299 px are first reduced to that with antialiasing (Lanczos, uint8), as
    Parmar et al. 2022 ask for; what is smaller goes through the bilinear resizing of the graph.

    Args:
      path: pt_inception-2015-12-05-6726825d.pth.
    Raises:
      WeightsError: if it holds other weights.
      OSError: if it cannot be opened.
    """
    return _network("Inception", inception, path, _at_most(inception.SIDE))


def efficientnet_network() -> Network:
    """EfficientNet-Lite0 on ImageNet, from its Python package.

    Images are resized to 224 px (bicubic, antialiased where they shrink, uint8).

    Raises:
      WeightsError: if the package is not installed.
    """
    path = efficientnet.weights_file()
    return _network("EfficientNet-Lite0", efficientnet, path, _exactly(efficientnet.SIDE))


def _network(name, architecture, path, prepare):
    state = read_torch(path)
    params = jax.device_put(architecture.from_torch(state))
    digest = 0
    for _, tensor in sorted(state.items()):
        digest = zlib.crc32(np.ascontiguousarray(tensor), digest)
    return Network(
        name=name,
        apply=architecture.apply,
        params=params,
        prepare=prepare,
        fingerprint=f"{digest:08x}",
    )


def _exactly(side):
    def prepare(image):
        if image.shape[0] == side:
            return image
        return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))

    return prepare


def _at_most(side):
    def prepare(image):
        if image.shape[0] <= side:
            return image
        return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))

    return prepare


_programs: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(apply):
    return _programs.setdefault(apply, jax.jit(apply))
