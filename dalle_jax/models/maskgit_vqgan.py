"""The VQ-GAN of MaskGIT: images to a grid of codes and back, without attention.

Not trained here: its public weights are a tokenizer of many later models. It differs from
`models.vqgan` by convolutions without bias, a mean in place of the halving convolution, as many
blocks in the decoder as in the encoder, pixels in [0, 1], and a shortcut that projects what the
block found, not what went into it.

Letters: B batch, R pixel side, G grid side, f = R / G, H and W sides of the image on its way,
C channels, D channels of a code, K codes.
Source: Chang et al. 2022, section 3 and the authors' released network, after Esser et al. 2021.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.models.convolution import Conv, init_kernels, upsample
from dalle_jax.models.vqgan import nearest
from dalle_jax.models.vqgan_blocks import Norm


@dataclass(frozen=True, kw_only=True)
class MaskGITVQGANConfig:
    """Sizes of MaskGIT's VQ-GAN; the defaults are those of the release with f = 16."""

    width: int = 128
    """Channels of the first group."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each group, in widths; the image halves between two groups."""
    blocks_per_group: int = 2
    """Residual blocks in each group and in the middle."""
    codes: int = 1024
    """Size K of the codebook."""
    code_width: int = 256
    """Channels D of a code."""

    def __post_init__(self):
        for name in ("blocks_per_group", "codes", "code_width"):
            if getattr(self, name) < 1:
                raise UserError(f"VQ-GAN {name} is {getattr(self, name)}; it must be at least 1")
        for multiplier in self.multipliers or (0,):
            width = self.width * multiplier
            if width < 4 or width % (32 if width >= 128 else 4):
                raise UserError(
                    f"VQ-GAN width times a multiplier is {width}; it must be a multiple of 4, and "
                    "from 128 on of 32, since channels are normalised in groups"
                )

    @property
    def factor(self) -> int:
        """Pixels per grid cell along one side, f."""
        return 2 ** (len(self.multipliers) - 1)


class Block(nn.Module):
    """Two convolutions, each behind a norm and a swish, beside the identity."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Adds the branch to x, or to its own projection where the width changes."""
        y = Conv(self.features, 3, bias=False, name="conv1")(nn.swish(Norm(name="norm1")(x)))
        y = Conv(self.features, 3, bias=False, name="conv2")(nn.swish(Norm(name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, bias=False, name="nin_shortcut")(y)
        return y + x


class Blocks(nn.Module):
    """Blocks of one width, one after the other."""

    features: int
    blocks: int
    upsample: bool = False
    """Whether both sides double afterwards, and a convolution follows."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """Runs the blocks."""
        for i in range(self.blocks):
            x = Block(self.features, name=f"block_{i}")(x)
        return Conv(self.features, 3, name="upsample_conv")(upsample(x)) if self.upsample else x


class Encoder(nn.Module):
    """Pixels to features of each grid cell."""

    config: MaskGITVQGANConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R R 3"]) -> Float[Array, "B G G D"]:
        """Runs the groups, fine to coarse, and the middle."""
        c = self.config
        x = Conv(c.width, 3, bias=False, name="conv_in")(x)
        for i, multiplier in enumerate(c.multipliers):
            x = Blocks(c.width * multiplier, c.blocks_per_group, name=f"down_{i}")(x)
            if i < len(c.multipliers) - 1:
                B, H, W, C = x.shape
                x = x.reshape(B, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4))
        x = Blocks(x.shape[-1], c.blocks_per_group, name="mid")(x)
        return Conv(c.code_width, 1, name="conv_out")(nn.swish(Norm(name="norm_out")(x)))


class Decoder(nn.Module):
    """Codes' features to pixels."""

    config: MaskGITVQGANConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B G G D"]) -> Float[Array, "B R R 3"]:
        """Runs the middle and the groups, coarse to fine; their numbers are the encoder's."""
        c = self.config
        widest = c.width * c.multipliers[-1]
        x = Conv(widest, 3, name="conv_in")(z)
        x = Blocks(widest, c.blocks_per_group, name="mid")(x)
        for i, multiplier in reversed(list(enumerate(c.multipliers))):
            group = Blocks(c.width * multiplier, c.blocks_per_group, i > 0, name=f"up_{i}")
            x = group(x)
        return Conv(3, 3, name="conv_out")(nn.swish(Norm(name="norm_out")(x)))


class MaskGITVQGAN(nn.Module):
    """Encoder, codebook and decoder."""

    config: MaskGITVQGANConfig

    def setup(self):
        """Makes the parts."""
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        table = nn.initializers.zeros_init()
        self.embedding = self.param("embedding", table, (c.codes, c.code_width))

    def __call__(self, images: Float[Array, "B R R 3"]) -> Float[Array, "B R R 3"]:
        """Encodes and decodes; says which parameters there are."""
        return self.decode(self.encode(images)[0])

    def encode(
        self, images: Float[Array, "B R R 3"]
    ) -> tuple[Int[Array, "B G G"], Float[Array, "B G G"]]:
        """The nearest code of each cell, and its squared distance.

        Args:
          images: f32 in [0, 1].
        Raises:
          ValueError: if the image is not square or its side no multiple of f.
        """
        _, H, W, _ = images.shape
        if H != W or H % self.config.factor:
            raise ValueError(
                f"the VQ-GAN got images of {H}x{W} pixels; they must be square with a side that "
                f"is a multiple of {self.config.factor}"
            )
        return nearest(self.encoder(images), self.embedding)

    def decode(self, codes: Int[Array, "B G G"]) -> Float[Array, "B R R 3"]:
        """Pixels, nearly all in [0, 1], for a grid of codes."""
        return self.decoder(self.embedding[codes])


def init_params(config: MaskGITVQGANConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters as `convolution.init_kernels` does; codes from N(0, 1)."""
    key_network, key_codes = jax.random.split(key)
    image = jax.ShapeDtypeStruct((1, config.factor, config.factor, 3), jnp.float32)
    init = MaskGITVQGAN(config).init
    params = init_kernels(jax.eval_shape(init, key, image)["params"], key_network)
    table = jax.random.normal(key_codes, (config.codes, config.code_width))
    return params | {"embedding": table}


def codes_and_errors(
    config: MaskGITVQGANConfig, params: PyTree, images: UInt8[Array | np.ndarray, "B R R 3"]
) -> tuple[Int[Array, "B G G"], Float16[Array, "B G G"]]:
    """Codes of images, and the squared distance of each cell's features to its code."""
    pixels = jnp.asarray(images, jnp.float32) / 255
    codes, errors = MaskGITVQGAN(config).apply({"params": params}, pixels, method="encode")
    return codes, jnp.minimum(errors, 65504).astype(jnp.float16)


def decode(
    config: MaskGITVQGANConfig, params: PyTree, codes: Int[Array | np.ndarray, "B G G"]
) -> UInt8[Array, "B R R 3"]:
    """Images of codes."""
    pixels = MaskGITVQGAN(config).apply({"params": params}, codes, method="decode")
    return jnp.round(pixels.clip(0, 1) * 255).astype(jnp.uint8)
