"""The patch discriminator: says of each part of an image whether it is real or reconstructed.

Letters: B batch, R pixel side, S side of the grid of patches, H and W sides, C and D channels.
Source: Isola et al. 2017, appendix 6.1.2, as Esser et al. 2021 use it; groups of channels are
normalised in place of batches (ours), so that an image's score is its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dalle_jax.models.convolution import init_kernels
from dalle_jax.models.vqgan_blocks import Norm


class PatchConv(nn.Module):
    """A 4x4 convolution with bias and one row of zeros on each side."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """Convolves."""
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        steps, zeros, dimensions = (self.stride,) * 2, ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, steps, zeros, dimension_numbers=dimensions)
        return y + bias[None, None, None]


class Discriminator(nn.Module):
    """Convolutions that halve the image `layers` times, and two that do not."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: Float[Array, "B R R 3"]) -> Float[Array, "B S S"]:
        """Scores the patches of images in [-1, 1]: greater where they look real."""
        x = nn.leaky_relu(PatchConv(self.width, 2, name="conv_0")(x), 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = PatchConv(self.width * min(2**i, 8), stride, name=f"conv_{i}")(x)
            x = nn.leaky_relu(Norm(name=f"norm_{i}")(x), 0.2)
        return PatchConv(1, 1, name="output")(x)[..., 0]


def init_params(discriminator: Discriminator, px: int, key: Key[Array, ""]) -> PyTree:
    """Initialises as `convolution.init_kernels` does (ours), for images of side px."""
    image = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    return init_kernels(jax.eval_shape(discriminator.init, key, image)["params"], key)
