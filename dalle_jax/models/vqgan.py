"""The VQ-GAN: images to a grid of codes and back, each code a point that features snap to.

Letters: B batch, R pixel side, G grid side, f = R / G, H and W sides of the image on its way,
C channels, D channels of a code, K codes.
Source: Esser et al. 2021, "Taming Transformers", section 3.1, and the authors' released network,
whose parameters have the names used here once "." and numbers are joined as in `down_0/block_1`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.models.convolution import Conv, init_kernels, kernel_axes
from dalle_jax.models.vqgan_blocks import (
    Downsample,
    Group,
    Middle,
    Norm,
    Upsample,
    fold,
    inverse_haar,
    unfold,
)

Quantizer = Literal["nearest", "cosine", "logits"]


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of the VQ-GAN; the defaults are those of the release with f = 16 and 1024 codes."""

    patch: int = 1
    """Pixels of each patch x patch square that become channels before the first convolution, and
    pixels again after the last (ours; the release has 1). 4 makes training about 3 times as fast
    on a CPU at the same f, with twice the parameters."""
    width: int = 128
    """Channels of the first group (`ch` in the release)."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each group, in widths (`ch_mult`); the image halves between two groups."""
    blocks_per_group: int = 2
    """Residual blocks in each group of the encoder (`num_res_blocks`); the decoder has one more."""
    attention: tuple[int, ...] = (16,)
    """Factors of reduction at which attention follows each block; it always stands in the middle.
    The release says `attn_resolutions`, the side of the image divided by these."""
    z_width: int = 256
    """Channels that the encoder ends and the decoder begins with (`z_channels`)."""
    codes: int = 1024
    """Size K of the codebook (`n_embed`)."""
    code_width: int = 256
    """Channels D of a code (`embed_dim`)."""
    quantizer: Quantizer = "nearest"
    """How features become a code: the nearest one; the nearest once both have length 1 (LlamaGen);
    or the greatest of K logits (the release's Gumbel networks). Only the first can be trained."""
    unit_pixels: bool = False
    """Whether its pixels lie in [0, 1], as those of dalle-mini's do, and not in [-1, 1]. Such a
    network is not trained here."""
    wavelets: bool = False
    """Whether the decoder ends in Haar wavelets, which double the side of the image (ruDALL-E); the
    encoder sees the mean of each 2 x 2 square. Such a network is not trained here."""

    def __post_init__(self):
        if self.quantizer not in get_args(Quantizer):
            raise UserError(
                f"VQ-GAN quantizer is {self.quantizer!r}, but must be one of "
                f"{list(get_args(Quantizer))}"
            )
        sizes = {name: getattr(self, name) for name in ("blocks_per_group", "z_width", "codes")}
        sizes |= {"code_width": self.code_width, "groups": len(self.multipliers)}
        sizes |= {"patch": self.patch}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"VQ-GAN {name} is {size}; it must be at least 1")
        for width in sorted(self.width * multiplier for multiplier in self.multipliers):
            if width < 4 or width % (32 if width >= 128 else 4):
                raise UserError(
                    f"VQ-GAN width times a multiplier is {width}; it must be a multiple of 4, and "
                    "from 128 on of 32, since channels are normalised in groups"
                )
        factors = {self.patch * 2**i for i in range(len(self.multipliers))}
        if odd := set(self.attention) - factors:
            raise UserError(
                f"VQ-GAN attention is at the factors {sorted(odd)}, but the groups reduce images "
                f"by {sorted(factors)}"
            )
        if self.wavelets and self.patch != 1:
            raise UserError(f"VQ-GAN patch is {self.patch}; with wavelets it must be 1")

    @property
    def factor(self) -> int:
        """Pixels per grid cell along one side, f."""
        return self.patch * 2 ** (len(self.multipliers) - 1 + self.wavelets)


class Encoder(nn.Module):
    """Pixels to features of each grid cell."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R R 3"]) -> Float[Array, "B G G C"]:
        """Runs the groups, fine to coarse, and the middle."""
        c = self.config
        if c.wavelets:
            B, H, W, C = x.shape
            x = x.reshape(B, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4))
        x = Conv(c.width, 3, name="conv_in")(fold(x, c.patch))
        for i, multiplier in enumerate(c.multipliers):
            x = Group(
                c.width * multiplier,
                c.blocks_per_group,
                c.patch * 2**i in c.attention,
                Downsample if i < len(c.multipliers) - 1 else None,
                name=f"down_{i}",
            )(x)
        x = Middle(name="mid")(x)
        return Conv(c.z_width, 3, name="conv_out")(nn.swish(Norm(name="norm_out")(x)))


class Decoder(nn.Module):
    """Features of each grid cell to pixels."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B G G C"]) -> Float[Array, "B R R 3"]:
        """Runs the middle and the groups, coarse to fine; their numbers are the encoder's."""
        c = self.config
        x = Conv(c.width * c.multipliers[-1], 3, name="conv_in")(z)
        x = Middle(name="mid")(x)
        for i, multiplier in reversed(list(enumerate(c.multipliers))):
            x = Group(
                c.width * multiplier,
                c.blocks_per_group + 1,
                c.patch * 2**i in c.attention,
                Upsample if i > 0 else None,
                name=f"up_{i}",
            )(x)
        channels = 12 if c.wavelets else 3 * c.patch**2
        x = Conv(channels, 3, name="conv_out")(nn.swish(Norm(name="norm_out")(x)))
        return inverse_haar(x) if c.wavelets else unfold(x, c.patch)


class Codebook(nn.Module):
    """The points that features snap to."""

    config: VQGANConfig

    def setup(self):
        """Declares the table, and what gives logits if codes are chosen by them."""
        c = self.config
        shape = (c.codes, c.code_width)
        self.embedding = self.param("embedding", nn.initializers.zeros_init(), shape)
        if c.quantizer == "logits":
            self.proj = Conv(c.codes, 1)

    def __call__(self, codes: Int[Array, "B G G"]) -> Float[Array, "B G G D"]:
        """Looks codes up."""
        entries = self.embedding[codes]
        return unit(entries) if self.config.quantizer == "cosine" else entries

    def choose(
        self, z: Float[Array, "B G G D"]
    ) -> tuple[Int[Array, "B G G"], Float[Array, "B G G"]]:
        """The code of each cell's features, and how badly it fits.

        Returns:
          Codes, and their squared distances, or minus the greatest logit.
        """
        if self.config.quantizer == "logits":
            logits = self.proj(z)
            return logits.argmax(axis=-1), -logits.max(axis=-1)
        if self.config.quantizer == "cosine":
            return nearest(unit(z), unit(self.embedding))
        return nearest(z, self.embedding)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder of one tokenizer for images."""

    config: VQGANConfig

    def setup(self):
        """Makes the parts."""
        c = self.config
        self.encoder = Encoder(c)
        self.quant_conv = Conv(c.code_width, 1)
        self.quantize = Codebook(c)
        self.post_quant_conv = Conv(c.z_width, 1)
        self.decoder = Decoder(c)

    def __call__(self, images: Float[Array, "B R R 3"]) -> Float[Array, "B R R 3"]:
        """Encodes and decodes; says which parameters there are."""
        return self.decode(self.codes_and_errors(images)[0])

    def codes_and_errors(
        self, images: Float[Array, "B R R 3"]
    ) -> tuple[Int[Array, "B G G"], Float[Array, "B G G"]]:
        """Codes of images, and how badly each fits; see `Codebook.choose`."""
        return self.quantize.choose(self.encode(images))

    def encode(self, images: Float[Array, "B R R 3"]) -> Float[Array, "B G G D"]:
        """Features of each grid cell, before they snap to codes.

        Args:
          images: f32, as `preprocess` gives them.
        Raises:
          ValueError: if the image is not square or its side no multiple of f.
        """
        _, H, W, _ = images.shape
        f = self.config.factor
        if H != W or H % f:
            raise ValueError(
                f"the VQ-GAN got images of {H}x{W} pixels; they must be square with a side that "
                f"is a multiple of {f}"
            )
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Float[Array, "B G G D"] | Int[Array, "B G G"]) -> Float[Array, "B R R 3"]:
        """Pixels for a grid of codes.

        Args:
          z: codes (integers in [0, K)) or what stands in the codebook for them.
        Returns:
          Pixels, nearly all in [-1, 1], or [0, 1] by `unit_pixels`.
        """
        return self.decoder(self.post_quant_conv(self.quantize(z) if z.ndim == 3 else z))


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of the same direction and length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(
    z: Float[Array, "B G G D"], table: Float[Array, "K D"]
) -> tuple[Int[Array, "B G G"], Float[Array, "B G G"]]:
    """The nearest code of each cell, the first of equals, and its squared distance."""
    exact = jax.lax.Precision.HIGHEST  # a code should not depend on the machine
    products = jnp.einsum("BGHD,KD->BGHK", z, table, precision=exact)
    codes = (jnp.square(table).sum(-1)[None, None, None] - 2 * products).argmin(-1)
    return codes, jnp.square(z - table[codes]).sum(-1)


def straight_through(z: Array, entries: Array) -> Array:
    """The codebook's entries in value, the features in gradient.

    Source: van den Oord et al. 2017, section 3.2.
    """
    return z + jax.lax.stop_gradient(entries - z)


def init_params(config: VQGANConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters, as `convolution.init_kernels` does (ours); codes from N(0, 1)."""
    key_network, key_codes = jax.random.split(key)
    image = jax.ShapeDtypeStruct((1, config.factor, config.factor, 3), jnp.float32)
    params = init_kernels(jax.eval_shape(VQGAN(config).init, key, image)["params"], key_network)
    table = jax.random.normal(key_codes, (config.codes, config.code_width))
    return params | {"quantize": params["quantize"] | {"embedding": table}}


def matrices(params: PyTree) -> PyTree:
    """Kernels of blocks, attention and sizes as matrices; see `convolution.kernel_axes`."""
    ends = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
    return kernel_axes(params, ends=ends)


def preprocess(images: UInt8[Array | np.ndarray, "B R R 3"]) -> Float[Array, "B R R 3"]:
    """Images as the encoder wants them: f32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def codes_and_errors(
    config: VQGANConfig, params: PyTree, images: UInt8[Array | np.ndarray, "B R R 3"]
) -> tuple[Int[Array, "B G G"], Float16[Array, "B G G"]]:
    """Codes of images, and how badly each cell's code fits: see `Codebook.choose`."""
    pixels = preprocess(images)
    if config.unit_pixels:
        pixels = (pixels + 1) / 2
    codes, errors = VQGAN(config).apply({"params": params}, pixels, method="codes_and_errors")
    return codes, errors.clip(-65504, 65504).astype(jnp.float16)


def decode(
    config: VQGANConfig, params: PyTree, codes: Int[Array | np.ndarray, "B G G"]
) -> UInt8[Array, "B R R 3"]:
    """Images of codes."""
    pixels = VQGAN(config).apply({"params": params}, codes, method="decode")
    return to_uint8(2 * pixels - 1 if config.unit_pixels else pixels)


def to_uint8(pixels: Float[Array, "B R R 3"]) -> UInt8[Array, "B R R 3"]:
    """Rounds pixels in [-1, 1] to [0, 255]."""
    return jnp.round((pixels.clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)
