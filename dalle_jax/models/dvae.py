"""The discrete VAE: images to a grid of codes and back.

Letters: B batch, R pixel side, G grid side, f = R / G, C channels, K codes.
Source: Ramesh et al. 2021, section 2.1 and appendix A, and the authors' released network: no
normalisation layers, ReLU only, zero "same" padding, a bias in every convolution.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.image.pixels import map_pixels, unmap_pixels
from dalle_jax.models.convolution import Conv, init_kernels, kernel_axes, max_pool, upsample


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Sizes of the dVAE; the defaults are the paper's (53.8M + 43.8M parameters)."""

    width: int = 256
    """Channels of the first group; each later encoder group has twice those of the one before."""
    groups: int = 4
    """Groups of residual blocks; the image shrinks by f = 2**(groups - 1)."""
    blocks_per_group: int = 2
    """Residual blocks in each group."""
    codes: int = 8192
    """Size K of the codebook."""
    code_width: int = 128
    """Channels that one code becomes in the decoder's first convolution."""
    residual_gain: float | None = None
    """Factor on every residual branch; None for the paper's 1 / (groups * blocks_per_group)**2."""
    code_std: float | None = None
    """Standard deviation of the decoder's first convolution at the start; None for 1 / sqrt(K) as
    everywhere else in the network."""

    def __post_init__(self):
        for name in ("width", "groups", "blocks_per_group", "codes", "code_width"):
            if getattr(self, name) < 1:
                raise UserError(f"dVAE {name} is {getattr(self, name)}; it must be at least 1")
        if self.width % 4:
            raise UserError(
                f"dVAE width is {self.width}; it must be a multiple of 4, since the blocks work "
                "at a quarter of it"
            )

    @property
    def factor(self) -> int:
        """Pixels per grid cell along one side, f."""
        return 2 ** (self.groups - 1)

    @property
    def gain(self) -> float:
        """The factor on residual branches that is in force."""
        if self.residual_gain is not None:
            return self.residual_gain
        return 1 / (self.groups * self.blocks_per_group) ** 2


class Codebook(nn.Module):
    """The decoder's first convolution: a 1x1 kernel that holds one row for each code."""

    codes: int
    features: int

    @nn.compact
    def __call__(self, z: Float[Array, "B G G K"] | Int[Array, "B G G"]) -> Float[Array, "B G G D"]:
        """Looks codes up, or mixes the rows by weights over the codes."""
        shape = (1, 1, self.codes, self.features)
        rows = self.param("kernel", nn.initializers.zeros_init(), shape)[0, 0]
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if z.ndim == 3:
            return rows[z] + bias[None, None, None]
        mixed = z.reshape(-1, self.codes) @ rows
        return mixed.reshape(*z.shape[:-1], self.features) + bias[None, None, None]


class Block(nn.Module):
    """A residual block: four convolutions at a quarter of the width, added with a small gain."""

    features: int
    sizes: tuple[int, int, int, int]
    gain: float
    enlarge: bool = False
    """Whether the image doubles its side (nearest) before the block, whose first size is 1."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """Adds the residual branch to x, or to its 1x1 projection where the width changes."""
        hidden = self.features // 4
        y = x
        for i, (size, features) in enumerate(
            zip(self.sizes, (hidden, hidden, hidden, self.features), strict=True), 1
        ):
            y = Conv(features, size, name=f"conv_{i}")(nn.relu(y))
            # Whatever works on one pixel gives the same before as after it is copied four times.
            y = upsample(y) if self.enlarge and i == 1 else y
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, name="id_path")(x)
        x = upsample(x) if self.enlarge else x
        return x + self.gain * y


class Encoder(nn.Module):
    """Mapped pixels to the logits of one categorical per grid cell."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B R R C"]) -> Float[Array, "B G G K"]:
        """Runs groups of blocks, a max-pool of 2 between them, and a 1x1 convolution to logits."""
        c = self.config
        x = Conv(c.width, 7, name="input")(x)
        for g in range(c.groups):
            for b in range(c.blocks_per_group):
                x = Block(
                    c.width * 2**g, (3, 3, 3, 1), c.gain, name=f"group_{g + 1}_block_{b + 1}"
                )(x)
            if g < c.groups - 1:
                x = max_pool(x)
        return Conv(c.codes, 1, name="output")(nn.relu(x))


class Decoder(nn.Module):
    """Codes (hard or soft) to the two parameters of each pixel's logit-Laplace density."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B G G K"] | Int[Array, "B G G"]) -> Float[Array, "B R R 6"]:
        """Runs the codebook, groups of blocks with nearest x2 between."""
        c = self.config
        x = Codebook(c.codes, c.code_width, name="input")(z)
        for g in range(c.groups):
            width = c.width * 2 ** (c.groups - 1 - g)
            for b in range(c.blocks_per_group):
                name = f"group_{g + 1}_block_{b + 1}"
                x = Block(width, (1, 3, 3, 3), c.gain, enlarge=g > 0 and b == 0, name=name)(x)
        return Conv(6, 1, name="output")(nn.relu(x))


class DVAE(nn.Module):
    """Encoder and decoder of one tokenizer for images."""

    config: DVAEConfig

    def setup(self):
        """Makes the two halves."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, images: Float[Array, "B R R 3"]) -> Float[Array, "B R R 6"]:
        """Encodes and decodes through the plain softmax; says which parameters there are."""
        return self.decode(nn.softmax(self.encode(images)))

    def encode(self, images: Float[Array, "B R R 3"]) -> Float[Array, "B G G K"]:
        """Logits of q(z|x) for each grid cell.

        Args:
          images: f32 in [0.1, 0.9], as `image.pixels.map_pixels` gives them.
        Returns:
          Unnormalised log-probabilities of the K codes; the argmax is the cell's token.
        Raises:
          ValueError: if the image is not square or its side no multiple of f.
        Source: Ramesh et al. 2021, appendix A.1.
        """
        _, H, W, _ = images.shape
        f = self.config.factor
        if H != W or H % f:
            raise ValueError(
                f"the dVAE got images of {H}x{W} pixels; they must be square with a side that "
                f"is a multiple of {f}"
            )
        return self.encoder(images)

    def decode(self, z: Float[Array, "B G G K"] | Int[Array, "B G G"]) -> Float[Array, "B R R 6"]:
        """Parameters of the pixel density for a grid of codes.

        Args:
          z: hard codes (integers in [0, K)) or weights over the codes, one-hot or relaxed.
        Returns:
          mu (three channels), then ln b (three channels), of the logit-Laplace density.
        Source: Ramesh et al. 2021, appendix A.1 and A.3.
        """
        return self.decoder(z)


def init_params(config: DVAEConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters, as `convolution.init_kernels` does; there is no factor for ReLU.

    Args:
      config: sizes; `code_std` replaces the deviation of the decoder's first kernel.
      key: for the one draw.
    Returns:
      Nested parameters in float32.
    Source: the released network's initialisation; that training used it is inferred.
    """
    side = config.factor
    init = DVAE(config).init
    shapes = jax.eval_shape(init, key, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    params = init_kernels(shapes["params"], key)
    if config.code_std is not None:
        table = params["decoder"]["input"]
        table["kernel"] *= config.code_std * math.sqrt(config.codes)
    return params


def matrices(params: PyTree) -> PyTree:
    """Kernels of the blocks as matrices; see `convolution.kernel_axes`."""
    return kernel_axes(params, ends=("input", "output"))


def preprocess(images: UInt8[Array | np.ndarray, "B R R 3"]) -> Float[Array, "B R R 3"]:
    """Images as the encoder and the likelihood want them: f32 in [0.1, 0.9].

    Source: Ramesh et al. 2021, appendix A.3.
    """
    return map_pixels(images.astype(jnp.float32) / 255)


def codes_and_errors(
    config: DVAEConfig, params: PyTree, images: UInt8[Array | np.ndarray, "B R R 3"]
) -> tuple[Int[Array, "B G G"], Float16[Array, "B G G"]]:
    """Codes of images, the likeliest one of each cell, without noise, and minus its logit.

    Source: Ramesh et al. 2021, section 2.2; the logit says how sure a code is in Fei et al. 2022,
    the first author's prototype.
    """
    logits = DVAE(config).apply({"params": params}, preprocess(images), method="encode")
    return logits.argmax(axis=-1), (-logits.max(axis=-1)).astype(jnp.float16)


def decode(
    config: DVAEConfig, params: PyTree, codes: Int[Array | np.ndarray, "B G G"]
) -> UInt8[Array, "B R R 3"]:
    """Images of codes, to look at; see `to_uint8`."""
    return to_uint8(DVAE(config).apply({"params": params}, codes, method="decode"))


def to_uint8(stats: Float[Array, "B R R 6"]) -> UInt8[Array, "B R R 3"]:
    """The image to look at: sigmoid(mu), mapped back to [0, 255]; ln b is ignored.

    Source: Ramesh et al. 2021, appendix A.3.
    """
    pixels = unmap_pixels(jax.nn.sigmoid(stats[..., :3]))
    return jnp.round(pixels * 255).astype(jnp.uint8)
