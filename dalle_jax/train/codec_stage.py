"""What the stages of the dVAE and of the VQ-GAN share: what they measure, draw and look at.

Source: ours.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.image.pixels import decibels
from dalle_jax.image.sheet import contact_sheet
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig
from dalle_jax.parallel.sharding_rules import CODEC
from dalle_jax.train.stage import Stage

log = logging.getLogger(__name__)

COLLAPSED = 1 / 8  # a codebook with less than this share of its codes in use gets a warning


class CodecStage(Stage):
    """A network that turns images into codes and back, as a stage of the training loop.

    Args:
      run: the settings, with the config of the network as `model`.
      init_images: a function giving uint8 [B, R, R, 3] training images for the k-means start.
      validation: a function giving one pass over the validation images, in batches with
        uint8 "image" [B, R, R, 3].
    """

    rules = CODEC

    against_collapse: str
    """Advice for a run whose codes fall out of use."""

    def __init__(self, run: Any, *, init_images: Callable[[], np.ndarray], validation):
        self.run = run
        self._init_images = init_images
        self._validation = validation
        self._reconstruct = jax.jit(self._codes_and_images)

    def init(self, key):
        """Initialises the parameters; see the network's own file."""
        return codecs.init_params(self.run.model, key)

    def network(self, params: PyTree) -> PyTree:
        """The part of the parameters in training that the model folder keeps."""
        return params

    def evaluate(self, params) -> dict[str, float]:
        """Measures reconstruction from codes over the validation images.

        Returns:
          psnr: mean over images of 10 log10(255^2 / MSE), in dB;
          psnr_foreground: the same over the pixels that are not white;
          codes: distinct codes seen; perplexity: exp of the entropy of their frequencies.
        """
        counts = np.zeros(self.run.model.codes, int)
        psnr, foreground = [], []
        for images in self._images():
            codes, decoded = map(np.asarray, self._reconstruct(params, images))
            counts += np.bincount(codes.ravel(), minlength=len(counts))
            for total, part in zip((psnr, foreground), decibels(images, decoded), strict=True):
                total.extend(part)
        used, perplexity = codecs.code_use(counts)
        if used < COLLAPSED * len(counts):
            log.warning(
                "the codebook has collapsed: %d of %d codes are in use; %s",
                used,
                len(counts),
                self.against_collapse,
            )
        return {
            "psnr": float(np.mean(psnr)),
            "psnr_foreground": float(np.mean(foreground)),
            "codes": used,
            "perplexity": perplexity,
        }

    def sheet(self, params):
        """Shows validation images, each row above its reconstruction."""
        images = next(iter(self._images()))
        images = images[: min(len(images) // 8, 2) * 8 or len(images)]  # whole rows of eight
        _, reconstructed = self._reconstruct(params, images)
        pairs = zip(
            *(np.split(x, max(len(x) // 8, 1)) for x in (images, reconstructed)), strict=True
        )
        rows = [row for pair in pairs for row in pair]
        return contact_sheet(np.stack(rows), ["images", "reconstructions"] * (len(rows) // 2))

    def _images(self) -> Iterable[np.ndarray]:
        for batch in self._validation():
            yield batch["image"]

    def _codes_and_images(self, params, images):
        config, params = self.run.model, self.network(params)
        codes, _ = codecs.codes_and_errors(config, params, images)
        return codes, codecs.decode(config, params, codes)


def reconstruction_sheet(
    images: UInt8[np.ndarray, "B R R 3"], reconstruct: Callable[[np.ndarray], np.ndarray]
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws up to 16 images, each row of eight above its reconstructions."""
    images = images[: min(len(images) // 8, 2) * 8 or len(images)]  # whole rows of eight
    drawn = reconstruct(images)
    pairs = zip(*(np.split(x, max(len(x) // 8, 1)) for x in (images, drawn)), strict=True)
    rows = [row for pair in pairs for row in pair]
    return contact_sheet(np.stack(rows), ["images", "reconstructions"] * (len(rows) // 2))


def check_sides(model: CodecConfig, *, px: int, crop_px: int | None) -> None:
    """Raises a UserError unless images and the squares cut from them fit the grid."""
    f = model.factor
    for name, side in (("px", px), ("crop_px", crop_px)):
        if side is not None and (side < f or side % f):
            raise UserError(f"{name} is {side}, but has to be a multiple of the model's f={f}")
    if crop_px is not None and crop_px > px:
        raise UserError(f"crop_px is {crop_px}, more than the images' px={px}")


def random_crops(
    key: Key[Array, ""], images: UInt8[Array, "B R R 3"], side: int, factor: int
) -> UInt8[Array, "B side side 3"]:
    """Cuts one square from each image, along the lines of the grid of codes."""
    B, R = images.shape[:2]
    at = factor * jax.random.randint(key, (B, 2), 0, (R - side) // factor + 1)

    def cut(image, at):
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (side, side, 3))

    return jax.vmap(cut)(images, at)
