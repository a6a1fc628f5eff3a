"""Encodes images to codes and decodes them, by a dVAE or a VQ-GAN, in micro-batches.

Letters: B batch, R pixel side, G grid side, K codes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float16, Int, Int32, UInt8

from dalle_jax.errors import UserError
from dalle_jax.generate import tensor_file
from dalle_jax.generate.micro_batching import micro_batches
from dalle_jax.generate.part_checks import check_tensors, codec_shapes
from dalle_jax.image import pixels
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig


class Codec:
    """Encodes and decodes images of one size, in bounded memory."""

    def __init__(
        self,
        *,
        px: int,
        codec: CodecConfig,
        codec_params: Any,
        kernels: tensor_file.Dtype = "bfloat16",
    ):
        """Checks that the parts belong to each other.

        Args:
          px: side R of its images, in pixels.
          codec: sizes of the dVAE or VQ-GAN.
          codec_params: its nested parameters.
          kernels: dtype that kernels are rounded to and stored in; float32 for imported models.
        Raises:
          ModelError: if the parameters have other sizes.
        """
        self.px, self.codec, self.kernels = px, codec, kernels
        self.kind = codecs.kind(codec)
        """One of `models.codec.KINDS`, the name of its file and of its fingerprint."""
        tensors = tensor_file.to_tensors(codec_params, kernels=kernels)
        check_tensors(codecs.TITLES[self.kind], tensors, codec_shapes(codec))
        fingerprint, self.codec_params = tensor_file.place(tensors)
        self.fingerprints = {self.kind: fingerprint}

    @property
    def codec_fingerprint(self) -> str:
        """Fingerprint of the codec's weights, to which codes belong."""
        return self.fingerprints[self.kind]

    @property
    def grid(self) -> int:
        """Side G of the grid of codes."""
        return self.px // self.codec.factor

    def encode(self, images: ArrayLike | Sequence[ArrayLike]) -> Int32[np.ndarray, "B G G"]:
        """Encodes images to codes; see `codes_and_errors`."""
        return self.codes_and_errors(images)[0]

    def codes_and_errors(
        self, images: ArrayLike | Sequence[ArrayLike]
    ) -> tuple[Int32[np.ndarray, "B G G"], Float16[np.ndarray, "B G G"]]:
        """Encodes images to codes, and measures how badly the code of each cell fits.

        Args:
          images: uint8 [B, H, W, 3], or a list of uint8 [H, W, 3] of any sizes; those that are
            not R x R are scaled to a short side of R and cut to the middle square.
        Returns:
          Codes in [0, K), and errors, greater where the fit is worse: of a VQ-GAN the squared
          distance to the code, of a dVAE minus the greatest logit.
        Raises:
          UserError: if an image is not uint8 with three channels.
        """
        squares: np.ndarray = np.empty((len(images), self.px, self.px, 3), np.uint8)
        for i, image in enumerate(images):
            squares[i] = pixels.square(np.asarray(image), self.px)
        codes: np.ndarray = np.empty((len(images), self.grid, self.grid), np.int32)
        errors: np.ndarray = np.empty(codes.shape, np.float16)
        for batch, _ in micro_batches(len(images), self._bytes_to_convolve()):
            encoded = _encode(self.codec, self.codec_params, squares[batch])
            codes[batch], errors[batch] = encoded
        return codes, errors

    def decode(self, codes: Int[ArrayLike, "B G G"]) -> UInt8[np.ndarray, "B R R 3"]:
        """Decodes codes to images.

        Args:
          codes: integers in [0, K).
        Returns:
          The images.
        Raises:
          UserError: if a code is not in the codebook.
        """
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codec.codes:
            raise UserError(
                f"codes go from {codes.min()} to {codes.max()}, but the codebook holds 0 to "
                f"{self.codec.codes - 1}; were they made by another {codecs.TITLES[self.kind]}?"
            )
        side = codes.shape[1] * self.codec.factor
        images = np.empty((len(codes), side, side, 3), np.uint8)
        for batch, _ in micro_batches(len(codes), self._bytes_to_convolve()):
            images[batch] = _decode(self.codec, self.codec_params, codes[batch])
        return images

    def _bytes_to_convolve(self):
        return 4 * 4 * self.px**2 * self.codec.width  # about four feature maps live at a time


_encode = jax.jit(codecs.codes_and_errors, static_argnums=0)
_decode = jax.jit(codecs.decode, static_argnums=0)
