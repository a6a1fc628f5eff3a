"""What a prior is made of: its sizes, and the parameters that training starts from.

Letters: P text positions, I image positions, T = P + I, D width, N heads, F mlp, V text vocabulary,
K codebook, G grid side, L layers.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.models.layers import init_layers, init_norm, normal
from dalle_jax.models.masks import Kind, layer_kinds

ATTENTION = ("sparse", "dense")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes of the prior; the defaults are those of the 12-billion-parameter model."""

    width: int = 3968
    """Width D of the residual stream; a multiple of heads."""
    depth: int = 64
    """Number of layers L, each one attention and one MLP branch."""
    heads: int = 62
    """Attention heads N a layer."""
    text_vocabulary: int = 16384
    """Number of pieces V of the tokenizer; pads are extra."""
    text_length: int = 256
    """Text positions P: the start token and P - 1 caption slots."""
    grid: int = 32
    """Side G of the square of image codes."""
    codes: int = 8192
    """Size K of the image codebook."""
    kernel: int = 11
    """Side of the convolution window of the last layer; odd."""
    mlp_ratio: int = 4
    """Width F of the MLP, in multiples of the width D."""
    attention: Literal["sparse", "dense"] = "sparse"
    """Whether layers see rows, columns and a convolution, as in the paper, or all before them."""

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise UserError(
                f"attention is {self.attention!r}, but must be one of {list(ATTENTION)}"
            )
        least = {"text_length": 2}  # the start token and one caption slot
        for name, size in vars(self).items():
            if isinstance(size, str):
                continue
            if size < least.get(name, 1):
                raise UserError(f"{name} is {size}, but must be at least {least.get(name, 1)}")
        if self.width % self.heads:
            raise UserError(f"width (={self.width}) must be a multiple of heads (={self.heads})")
        if self.kernel % 2 == 0:
            raise UserError(f"kernel is {self.kernel}, but must be odd, so that it has a middle")

    @property
    def image_length(self) -> int:
        """Image positions I = G * G."""
        return self.grid**2

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return layer_kinds(self.depth) if self.attention == "sparse" else ("dense",) * self.depth

    @property
    def length(self) -> int:
        """All positions T = P + I."""
        return self.text_length + self.image_length


def check_lengths(config: Any, text: Array, codes: Array | None = None) -> None:
    """Raises a ValueError unless captions, and codes if given, are as long as a prior wants them.

    Args:
      config: of a prior of either kind.
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


def init_embeddings(key: Key[Array, ""], config: PriorConfig) -> PyTree:
    """Tables of tokens and of places, all from N(0, 0.125 / sqrt(D))."""
    rows = {
        "text": config.text_vocabulary,
        "slot": config.text_length - 1,
        "pad": config.text_length - 1,
        "code": config.codes,
        "row": config.grid,
        "column": config.grid,
    }
    return init_tables(key, rows, single=("start_of_text", "start_of_image"), width=config.width)


def init_tables(
    key: Key[Array, ""], rows: dict[str, int], *, single: tuple[str, ...], width: int
) -> PyTree:
    """Draws tables of as many rows as named, and single vectors, from N(0, 0.125 / sqrt(D))."""
    rows = rows | dict.fromkeys(single, 1)
    # one draw for all of them: each draw adds about half a second of compilation on a CPU
    drawn = normal(key, (sum(rows.values()), width), 0.125 * width**-0.5)
    tables = jnp.split(drawn, list(itertools.accumulate(rows.values()))[:-1])
    embed = dict(zip(rows, tables, strict=True))
    return embed | {name: embed[name][0] for name in single}


def init_stack(key: Key[Array, ""], config: Any) -> PyTree:
    """All layers of a prior of either kind, stacked on a first axis of size L."""
    L, D = config.depth, config.width
    F = D * config.mlp_ratio
    residual = (2 * L) ** -0.5
    stds = {
        "qkv": 0.125 * D**-0.5,
        "attention_out": 0.125 * residual * D**-0.5,
        "mlp_in": 0.125 * D**-0.5,
        "mlp_out": 0.125 * residual * F**-0.5,
    }
    return init_layers(key, depth=L, width=D, heads=config.heads, mlp=F, stds=stds)


def init_head(key: Key[Array, ""], config: PriorConfig) -> PyTree:
    """The last norm, and heads of zeros."""
    del key  # zero heads: every token starts equally likely
    D = config.width
    sizes = {"text": config.text_vocabulary, "image": config.codes}
    heads = {name: {"kernel": jnp.zeros((D, size))} for name, size in sizes.items()}
    return {"norm": init_norm((D,))} | heads
