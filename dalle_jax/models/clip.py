"""The contrastive model that says how well an image fits a caption.

Letters: B batch, T positions, P text positions, D width, N heads, H head size, L layers, V text
vocabulary, R pixel side, G grid side of patches, E features.

    text     start, caption slots, end    causal; the feature is read at the first end token
    image    class token, G * G patches   all see all; the feature is read at the class token
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from dalle_jax.errors import UserError
from dalle_jax.models.attention import dense
from dalle_jax.models.layers import init_layers, init_norm, layer, layer_norm, normal, split_qkv

NORM_EPSILON = 1e-5
LOG_SCALE_START = math.log(1 / 0.07)
LOG_SCALE_MAX = math.log(100)  # similarities are multiplied by 100 at most
# Mean and standard deviation of red, green and blue on [0, 1] in the authors' training images.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of the contrastive model; the defaults are those of ViT-B/32."""

    px: int = 224
    """Side R of its images, in pixels."""
    patch: int = 32
    """Side of the square patches that an image is cut into, in pixels."""
    image_width: int = 768
    """Width D of the image transformer; a multiple of its heads."""
    image_depth: int = 12
    """Layers L of the image transformer."""
    image_heads: int = 12
    """Heads N of the image transformer."""
    text_width: int = 512
    """Width D of the text transformer; a multiple of its heads."""
    text_depth: int = 12
    """Layers L of the text transformer."""
    text_heads: int = 8
    """Heads N of the text transformer."""
    text_vocabulary: int = 49406
    """Number of pieces V of the tokenizer; start and end are extra."""
    text_length: int = 77
    """Text positions P: the start token, P - 2 caption slots and the end token."""
    features: int = 512
    """Size E of the features that images and captions share."""
    mlp_ratio: int = 4
    """Width of the MLPs, in multiples of the width D."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size, least = getattr(self, field.name), 3 if field.name == "text_length" else 1
            if size < least:
                raise UserError(f"{field.name} is {size}, but must be at least {least}")
        for size, part in (
            ("px", "patch"),
            ("image_width", "image_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, size) % getattr(self, part):
                raise UserError(
                    f"{size} (={getattr(self, size)}) must be a multiple of {part} "
                    f"(={getattr(self, part)})"
                )

    @property
    def grid(self) -> int:
        """Side G of the square of patches."""
        return self.px // self.patch

    @property
    def slots(self) -> int:
        """Caption slots between start and end."""
        return self.text_length - 2


class CLIP(nn.Module):
    """Features of images and captions, close to each other where they belong together.

    Weights start as in the authors' text transformer, in both transformers; embeddings there from
    N(0, 0.02^2) and N(0, 0.01^2), those of the image from N(0, 1 / D). A caption of P - 2 tokens
    is followed by the end token just as a shorter one; what stands behind it is not seen.
    """

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32
    """Of matrix products and attention; residual stream, norms and features are float32."""
    constrain: Callable[[Array], Array] = lambda x: x
    """Constrains the sharding of the residual stream [B, T, D]."""

    def setup(self):
        """Declares the parameters: weight matrices are named kernel, their biases bias."""
        c = self.config
        self.image = self.param("image", _init_image, c)
        self.text = self.param("text", _init_text, c)
        self.log_scale = self.param("log_scale", lambda _: jnp.float32(LOG_SCALE_START))

    def __call__(
        self, images: UInt8[Array, "B R R 3"], text: Int[Array, "B slots"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"], Float[Array, ""]]:
        """Gives the features of images and of captions, and the factor on their similarities."""
        return self.encode_images(images), self.encode_text(text), jnp.exp(self.log_scale)

    def encode_images(self, images: UInt8[Array, "B R R 3"]) -> Float[Array, "B E"]:
        """Gives a vector of length 1 for each image.

        Args:
          images: RGB, 0 to 255, of the config's side.

        Raises:
          ValueError: if they have another side.

        Source: Radford et al. 2021, section 2.4, after Dosovitskiy et al. 2020; the norm ahead of
          the layers is the authors'.
        """
        c, weights = self.config, self.image
        B, R = images.shape[:2]
        if c.px != R:
            raise ValueError(f"got images of side {R}, but this model reads images of {c.px}")
        x = (images / 255.0 - MEAN[None, None, None]) / STD[None, None, None]
        x = x.reshape(B, c.grid, c.patch, c.grid, c.patch, 3).swapaxes(2, 3)
        x = x.reshape(B, c.grid**2, -1).astype(self.dtype)
        x = (x @ weights["patch"]["kernel"].astype(self.dtype)).astype(jnp.float32)  # B G*G D
        start = jnp.broadcast_to(weights["class"], (B, 1, c.image_width))
        x = jnp.concatenate([start, x], axis=1) + weights["position"][None]
        x = _norm(weights["first_norm"], x)
        all_visible = np.ones((x.shape[1],) * 2, bool)
        x = self._run_layers(weights["layers"], x, all_visible)
        return _feature(weights, x[:, 0])

    def encode_text(self, text: Int[Array, "B slots"]) -> Float[Array, "B E"]:
        """Gives a vector of length 1 for each caption.

        Args:
          text: P - 2 caption slots; ids in [0, V), or from V on for a slot without a token.

        Raises:
          ValueError: if there is another number of slots.

        Source: Radford et al. 2021, section 2.4.
        """
        c, weights = self.config, self.text
        B, slots = text.shape
        if slots != c.slots:
            raise ValueError(
                f"got {slots} caption slots, but text_length {c.text_length} needs {c.slots}, "
                "since start and end take a position each"
            )
        V = c.text_vocabulary
        start, end = jnp.full((B, 1), V), jnp.full((B, 1), V + 1)
        ids = jnp.concatenate([start, jnp.where(text < V, text, V + 1), end], axis=1)
        x = weights["token"][ids] + weights["position"][None]  # B P D
        x = self._run_layers(weights["layers"], x, np.tri(c.text_length, dtype=bool))
        at_end = jnp.argmax(ids == V + 1, axis=1)  # the first of them
        x = jnp.take_along_axis(x, at_end[:, None, None], axis=1)[:, 0]
        return _feature(weights, x)

    def _run_layers(self, stack, x, mask):
        def attend(qkv):
            return dense(*split_qkv(qkv), mask=mask), None

        def run_layer(x, weights):
            x = self.constrain(x)
            return layer(weights, x, attend, dtype=self.dtype, epsilon=NORM_EPSILON)

        return jax.lax.scan(run_layer, x, stack)[0]


def _norm(weights, x):
    return layer_norm(weights, x, epsilon=NORM_EPSILON)


def _feature(weights, x):
    x = _norm(weights["last_norm"], x) @ weights["projection"]["kernel"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _init_image(key, c):
    D = c.image_width
    key_layers, key_patch, key_ends = jax.random.split(key, 3)
    ends = normal(key_ends, (c.grid**2 + 2, D), D**-0.5)  # few draws: each compiles
    return {
        "patch": {"kernel": normal(key_patch, (c.patch**2 * 3, D), (c.patch**2 * 3) ** -0.5)},
        "class": ends[0],
        "position": ends[1:],
        "first_norm": init_norm((D,)),
        **_init_tower(key_layers, c, D, c.image_depth, c.image_heads),
    }


def _init_text(key, c):
    D = c.text_width
    key_layers, key_token, key_position = jax.random.split(key, 3)
    return {
        "token": normal(key_token, (c.text_vocabulary + 2, D), 0.02),
        "position": normal(key_position, (c.text_length, D), 0.01),
        **_init_tower(key_layers, c, D, c.text_depth, c.text_heads),
    }


def _init_tower(key, c, D, L, heads) -> dict[str, Any]:
    key_layers, key_projection = jax.random.split(key)
    residual = (2 * L) ** -0.5
    stds = {
        "qkv": D**-0.5,
        "attention_out": residual * D**-0.5,
        "mlp_in": (2 * D) ** -0.5,
        "mlp_out": residual * D**-0.5,
    }
    return {
        "layers": init_layers(
            key_layers, depth=L, width=D, heads=heads, mlp=c.mlp_ratio * D, stds=stds
        ),
        "last_norm": init_norm((D,)),
        "projection": {"kernel": normal(key_projection, (D, c.features), D**-0.5)},
    }
