"""The sizes of a prior.

Letters: P text positions, I image positions, T = P + I, D width, N heads, F mlp, V text vocabulary,
K codebook, G grid side, L layers.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array

from dalle_jax.errors import UserError
from dalle_jax.models.masks import Kind, layer_kinds

ATTENTION = ("sparse", "dense")
ORDERS = ("raster", "annealed")


@dataclass(frozen=True, kw_only=True)
class PriorSizes:
    """Sizes that every prior has; the defaults are those of the 12-billion-parameter model."""

    width: int = 3968
    """Width D of the residual stream; a multiple of heads."""
    depth: int = 64
    """Number of layers L, each one attention and one MLP branch."""
    heads: int = 62
    """Attention heads N of a layer."""
    text_vocabulary: int = 16384
    """Number of pieces V of the tokenizer; pads are extra."""
    text_length: int = 256
    """Text positions P: the start token and P - 1 caption slots."""
    grid: int = 32
    """Side G of the square of image codes."""
    codes: int = 8192
    """Size K of the image codebook."""
    mlp_ratio: int = 4
    """Width F of the MLP, in multiples of the width D."""

    def __post_init__(self):
        least = {"text_length": 2}  # the start token and one caption slot
        for name, size in vars(self).items():
            if not isinstance(size, str) and size < least.get(name, 1):
                raise UserError(f"{name} is {size}, but must be at least {least.get(name, 1)}")
        if self.width % self.heads:
            raise UserError(f"width (={self.width}) must be a multiple of heads (={self.heads})")

    @property
    def image_length(self) -> int:
        """Image positions I = G * G."""
        return self.grid**2

    @property
    def length(self) -> int:
        """All positions T = P + I."""
        return self.text_length + self.image_length


@dataclass(frozen=True, kw_only=True)
class PriorConfig(PriorSizes):
    """Sizes of the autoregressive prior."""

    kernel: int = 11
    """Side of the convolution window of the last layer; odd."""
    attention: Literal["sparse", "dense"] = "sparse"
    """Whether layers see rows, columns and a convolution, as in the paper, or all before them."""
    order: Literal["raster", "annealed"] = "raster"
    """Order of the cells in training: raster order, or random orders at first and raster order at
    the end (RAR, Yu et al. 2024), for which inputs also say where their own code lies. Needs dense
    attention; samples come in raster order."""

    def __post_init__(self):
        for name, choices in (("attention", ATTENTION), ("order", ORDERS)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is {value!r}, but must be one of {list(choices)}")
        if self.order == "annealed" and self.attention != "dense":
            raise UserError(
                f"order annealed needs attention dense, but it is {self.attention}: rows and "
                "columns mean nothing in a random order"
            )
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise UserError(f"kernel is {self.kernel}, but must be odd, so that it has a middle")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The attention kind of each layer."""
        return layer_kinds(self.depth) if self.attention == "sparse" else ("dense",) * self.depth


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(PriorSizes):
    """Sizes of the progressive prior."""

    width: int = 512
    """Width D of the residual streams; a multiple of heads."""
    depth: int = 12
    """Number of layers L, content and query layers together."""
    query_depth: int = 6
    """How many of them are query layers, at least 1; the others, at least 1, are content layers."""
    heads: int = 8
    """Attention heads N of a layer."""

    def __post_init__(self):
        if self.depth < 2:
            raise UserError(f"depth is {self.depth}, but must be at least 2")
        super().__post_init__()
        if self.query_depth >= self.depth:
            raise UserError(
                f"query_depth is {self.query_depth}, but must be below depth (={self.depth}), "
                "since the lower layers read the text and the filled cells"
            )

    @property
    def content_depth(self) -> int:
        """How many layers read the text and the filled cells."""
        return self.depth - self.query_depth


def check_lengths(config: PriorSizes, text: Array, codes: Array | None = None) -> None:
    """Raises a UserError unless captions, and codes if given, have the lengths of a prior.

    Args:
      config: of the prior.
      text: captions [B, slots].
      codes: of images [B, I].
    """
    if text.shape[1] != config.text_length - 1:
        raise UserError(
            f"got {text.shape[1]} caption slots, but text_length {config.text_length} "
            f"needs {config.text_length - 1}, since the first position is the start token"
        )
    if codes is not None and codes.shape[1] != config.image_length:
        raise UserError(
            f"got {codes.shape[1]} codes an image, but grid {config.grid} needs "
            f"{config.image_length}; were these codes made by another dVAE?"
        )


PUBLISHED = {
    "2.8B": PriorConfig(width=1920, heads=30),
    "5.6B": PriorConfig(width=2688, heads=42),
    "12B": PriorConfig(width=3968, heads=62),
}
"""Table 1 of Ramesh et al. 2021; the sizes count layers alone, without embeddings and heads."""


BRANCHES = (("attention_norm", "qkv", "attention_out"), ("mlp_norm", "mlp_in", "mlp_out"))
"""Parameters of the two resblocks of a layer."""
