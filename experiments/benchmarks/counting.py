"""How many multiplications and bytes a model needs, for shares of what the machine can do.

Letters: B batch, T positions (P text + I image), D width, F mlp, V text vocabulary, K codes,
L layers, G grid side, R pixel side, f = R / G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from dalle_jax.models.attention import blocked
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.kv_cache import layout
from dalle_jax.models.prior_config import PriorConfig, ProgressiveConfig


class Multiplications(NamedTuple):
    """Of one forward pass for one example; an update needs 6 FLOP for each, a forward pass 2."""

    linear: int
    """Layers and heads."""
    attention: int
    """Logits that are computed, seen or not, and mixing as many values."""

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


def prior_forward(config: PriorConfig) -> Multiplications:
    """A forward pass over one caption and image.

    Each position meets the head of its own vocabulary alone. Attention is counted in the program
    that `blocked` traces to.
    """
    c = config
    heads = (c.text_length - 1) * c.width * c.text_vocabulary
    heads += c.image_length * c.width * c.codes
    attention = sum(attention_forward(c, kind) for kind in c.kinds)
    return Multiplications(c.depth * _layer(c) * c.length + heads, attention)


def attention_forward(config: PriorConfig, kind: str) -> int:
    """One attention layer on one example, without its linear maps."""
    c = config
    shape = (1, c.length, c.heads, c.width // c.heads)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    sizes = {"text_length": c.text_length, "grid": c.grid, "kernel": c.kernel}
    program = jax.make_jaxpr(lambda q, k, v: blocked(q, k, v, kind=kind, **sizes))(x, x, x)
    return _products(program.jaxpr)


def decode_step(
    config: PriorConfig, batch: int, *, captions: int, kernel_bytes: int = 4
) -> tuple[int, int]:
    """Bytes that one step of decoding has to read, and its FLOP.

    Each weight of the layers and of the image head is read once, and so are the keys and values
    that a layer looks at: the text's once for each caption, and for each image the slots that
    the cache of its kind offers to a query, full or not.

    Args:
      config: sizes.
      batch: images drawn side by side.
      captions: different captions among them.
      kernel_bytes: of a number in the layers' kernels and in the caches; the head is in float32.
    """
    c = config
    slots = sum(layout(kind, grid=c.grid, kernel=c.kernel).seen.shape[1] for kind in c.kinds)
    text = c.depth * c.text_length
    kernels, head = c.depth * _layer(c), c.width * c.codes
    cached = 2 * c.width * (captions * text + batch * slots)
    flop = 2 * batch * (kernels + head + 2 * c.width * (text + slots))
    return kernel_bytes * (kernels + cached) + 4 * head, flop


def stage(
    config: ProgressiveConfig, batch: int, *, cells: int, positions: int, kernel_bytes: int = 4
) -> tuple[int, int]:
    """Bytes that one stage of the progressive sampler has to read, and its FLOP.

    Args:
      config: sizes.
      batch: images sampled side by side.
      cells: that are sampled and added in the stage.
      positions: of the caches, which are read once.
      kernel_bytes: of a number in the layers' kernels and in the caches; the head is in float32.
    """
    c = config
    kernels, head = c.depth * _layer(c), c.width * c.codes
    cached = 2 * c.width * c.depth * positions
    flop = 2 * batch * cells * (kernels + head + cached)
    return kernel_bytes * (kernels + batch * cached) + 4 * head, flop


def encoder_forward(config: DVAEConfig, px: int) -> int:
    """The convolutions of the dVAE's encoder on one image, as they are written."""
    c = config
    total = px**2 * 7 * 7 * 3 * c.width
    previous = c.width
    for group in range(c.groups):
        width, pixels = c.width * 2**group, (px >> group) ** 2
        for _ in range(c.blocks_per_group):
            total += pixels * _block(previous, width, (3, 3, 3, 1))
            previous = width
    return total + (px // c.factor) ** 2 * previous * c.codes


def decoder_forward(config: DVAEConfig, px: int) -> int:
    """The convolutions of the dVAE's decoder on one image, with relaxed codes."""
    c = config
    total = (px // c.factor) ** 2 * c.codes * c.code_width
    previous = c.code_width
    for group in reversed(range(c.groups)):
        width, pixels = c.width * 2**group, (px >> group) ** 2
        for _ in range(c.blocks_per_group):
            total += pixels * _block(previous, width, (1, 3, 3, 3))
            previous = width
    return total + px**2 * previous * 6


def _layer(config):
    """Weights of one layer that a position is multiplied with."""
    return (4 + 2 * config.mlp_ratio) * config.width**2


def _block(before, width, sizes):
    hidden = width // 4
    path = (before, hidden, hidden, hidden, width)
    branch = sum(s**2 * path[i] * path[i + 1] for i, s in enumerate(sizes))
    return branch + (before * width if before != width else 0)


def _products(jaxpr):
    """Multiplications of all matrix products in a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            count = equation.outvars[0].aval.size
            for axis in contracted:
                count *= equation.invars[0].aval.shape[axis]
            total += count
        inner = sum(_products(part) for part in jaxprs_in_params(equation.params))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total
