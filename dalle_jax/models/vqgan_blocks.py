"""The blocks of the VQ-GAN: norm, convolutions, attention, and what changes the size of an image.

Letters: B batch, H and W sides of the image on its way, C and D channels.
Source: Esser et al. 2021, the authors' released network, whose parameters have the names used here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle_jax.models.convolution import Conv, upsample


def _groups(channels: int) -> int:
    """Groups of a norm: 32 as in the release, but at least four channels in each (ours)."""
    return min(32, channels // 4)


def fold(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B H2 W2 D"]:
    """Turns each patch x patch square of pixels into the channels of one position."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.swapaxes(2, 3).reshape(B, H // patch, W // patch, patch * patch * C)


def unfold(x: Float[Array, "B H W D"], patch: int) -> Float[Array, "B H2 W2 C"]:
    """Undoes `fold`."""
    B, H, W, D = x.shape
    x = x.reshape(B, H, W, patch, patch, D // patch**2).swapaxes(2, 3)
    return x.reshape(B, H * patch, W * patch, D // patch**2)


def inverse_haar(x: Float[Array, "B H W D"]) -> Float[Array, "B 2*H 2*W C"]:
    """Puts an image together from its Haar wavelets.

    Args:
      x: C means, twice what the mean of a 2 x 2 square is; then, of each colour, its differences
        between rows, between columns, and between diagonals: D = 4 C.
    Source: the decoder of ruDALL-E; Mallat 1989.
    """
    B, H, W, D = x.shape
    C = D // 4
    means, others = x[..., :C], x[..., C:].reshape(B, H, W, C, 3)
    signs = jnp.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # of each pixel in order
    pixels = (means[..., None, :] + jnp.einsum("BHWCK,PK->BHWPC", others, signs)) / 2
    return unfold(pixels.reshape(B, H, W, 4 * C), 2)


class Norm(nn.Module):
    """Normalises groups of channels over the whole image, with a gain and a bias.

    `nn.GroupNorm` gives the same numbers. On two CPU cores it and its gradient take 1.2 times as
    long for 8 images of 48 x 48 x 96, and between 0.9 and 1.7 times for smaller ones.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Gives each group mean 0 and variance 1."""
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones_init(), (C,))
        bias = self.param("bias", nn.initializers.zeros_init(), (C,))
        x = x.reshape(B, H * W, _groups(C), -1)
        x = x - x.mean(axis=(1, 3), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 3), keepdims=True) + 1e-6)
        return x.reshape(B, H, W, C) * scale[None, None, None] + bias[None, None, None]


class ResnetBlock(nn.Module):
    """Two convolutions, each behind a norm and a swish, beside the identity."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Adds the branch to x, or to its 1x1 projection where the width changes."""
        y = Conv(self.features, 3, name="conv1")(nn.swish(Norm(name="norm1")(x)))
        y = Conv(self.features, 3, name="conv2")(nn.swish(Norm(name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, name="nin_shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Every cell looks at all cells, with one head."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Adds what each cell has seen."""
        B, H, W, C = x.shape
        y = Norm(name="norm")(x)
        q, k, v = (Conv(C, 1, name=name)(y).reshape(B, H * W, C) for name in "qkv")
        weights = nn.softmax(jnp.einsum("BTC,BSC->BTS", q, k) * C**-0.5)
        y = jnp.einsum("BTS,BSC->BTC", weights, v).reshape(B, H, W, C)
        return x + Conv(C, 1, name="proj_out")(y)


class Downsample(nn.Module):
    """Halves both sides with a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
        """Convolves with stride 2 and zeros at the right and the bottom only."""
        return Conv(x.shape[-1], 3, halve=True, name="conv")(x)


class Upsample(nn.Module):
    """Doubles both sides, nearest, before a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
        """Convolves the enlarged image."""
        return Conv(x.shape[-1], 3, name="conv")(upsample(x))


class Group(nn.Module):
    """Blocks of one width, and what leads to the next group."""

    features: int
    blocks: int
    attends: bool
    then: type[nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """Runs the blocks, each with attention behind it if the group attends."""
        for i in range(self.blocks):
            x = ResnetBlock(self.features, name=f"block_{i}")(x)
            if self.attends:
                x = Attention(name=f"attn_{i}")(x)
        return x if self.then is None else self.then(name=self.then.__name__.lower())(x)


class Middle(nn.Module):
    """Block, attention, block at the smallest size."""

    @nn.compact
    def __call__(self, x: Float[Array, "B G G C"]) -> Float[Array, "B G G C"]:
        """Runs the three."""
        x = ResnetBlock(x.shape[-1], name="block_1")(x)
        x = Attention(name="attn_1")(x)
        return ResnetBlock(x.shape[-1], name="block_2")(x)
