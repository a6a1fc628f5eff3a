"""Small number formats: float32 arrays that hold only what such a format can, and their 16 bits.

A format is named by its bits as the paper does, sign-exponent-significand. The paper keeps Adam's
mean in 1-6-9 and its variance in 0-6-10, PowerSGD's arrays and what is sent of them in 1-6-9. As
in IEEE formats the lowest exponent code holds zero and subnormals, the highest infinity and NaN.

Source: Ramesh et al. 2021, appendix D; biases as below.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt16


class _Format(NamedTuple):
    signed: bool
    exponent: int
    """Bits of the exponent."""
    significand: int
    """Bits of the significand, without the one before the point."""
    bias: int

    @property
    def least_exponent(self):
        return 1 - self.bias

    @property
    def largest(self):
        return (2 - 2.0**-self.significand) * 2.0 ** (2**self.exponent - 2 - self.bias)


_FORMATS = {
    # The paper's maximum "slightly less than 16" asks for bias 59: normal from 2**-58 to 15.98.
    "1-6-9": _Format(True, 6, 9, bias=59),
    # Ours: the greatest bias that holds the paper's bound of 5; normal from 2**-59 to 7.996.
    "0-6-10": _Format(False, 6, 10, bias=60),
}


def has_16_bits(path: tuple[Any, ...]) -> bool:
    """Whether the paper stores a parameter in 16 bits: the kernels of the layers, and nothing else.

    Args:
      path: of the parameter, as JAX gives it.
    Source: Ramesh et al. 2021, appendix D: gains, biases, embeddings and heads stay float32.
    """
    return path[0].key == "layers" and path[-1].key == "kernel"


def largest(format: str) -> float:
    """The largest finite number of a format.

    Args:
      format: "1-6-9" or "0-6-10".
    Returns:
      15.984375 or 7.99609375.
    Raises:
      ValueError: for another name.
    Source: Ramesh et al. 2021, appendix D, for 1-6-9; ours for 0-6-10.
    """
    return _named(format).largest


def round_to(x: Float32[Array, "*shape"], format: str) -> Float32[Array, "*shape"]:
    """Rounds to the nearest number of a format, and of two equally near to the even one.

    Args:
      x: any numbers; those beyond the largest by half a step or more become infinite, NaN stays.
      format: "1-6-9", or "0-6-10", where what is below 0 becomes NaN.
    Returns:
      Numbers of the format, kept in float32. Differentiating gives 0: rounding is flat.
    Raises:
      ValueError: for another name.
    Source: Ramesh et al. 2021, appendix D.
    """
    kind = _named(format)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = jnp.maximum(((bits >> 23) & 0xFF) - 127, kind.least_exponent)
    steps = jnp.round(x * _power_of_two(kind.significand - exponent))
    rounded = steps * _power_of_two(exponent - kind.significand)
    rounded = jnp.where(jnp.abs(rounded) > kind.largest, jnp.copysign(jnp.inf, x), rounded)
    return rounded if kind.signed else jnp.where(x < 0, jnp.nan, jnp.abs(rounded))


def encode(x: Float32[Array, "*shape"], format: str) -> UInt16[Array, "*shape"]:
    """Rounds as `round_to` and gives the 16 bits of each number, sign first.

    Args:
      x: any numbers.
      format: "1-6-9" or "0-6-10".
    Raises:
      ValueError: for another name.
    Source: ours; the format has no word in the paper for its bits.
    """
    kind = _named(format)
    rounded = round_to(x, format)
    bits = jax.lax.bitcast_convert_type(jnp.abs(rounded), jnp.int32)
    exponent, fraction = (bits >> 23) - 127, (bits & 0x7FFFFF) >> (23 - kind.significand)
    normal = ((exponent + kind.bias) << kind.significand) | fraction
    steps = jnp.abs(rounded) * _power_of_two(jnp.int32(kind.significand - kind.least_exponent))
    code = jnp.where(exponent < kind.least_exponent, steps.astype(jnp.int32), normal)
    infinite = (2**kind.exponent - 1) << kind.significand
    code = jnp.where(jnp.isinf(rounded), infinite, code)
    code = jnp.where(jnp.isnan(rounded), infinite + 1, code)
    if kind.signed:
        code |= jnp.signbit(rounded).astype(jnp.int32) << (kind.exponent + kind.significand)
    return code.astype(jnp.uint16)


def decode(code: UInt16[Array, "*shape"], format: str) -> Float32[Array, "*shape"]:
    """The numbers of `encode`'s bits.

    Args:
      code: any 16 bits.
      format: "1-6-9" or "0-6-10".
    Raises:
      ValueError: for another name.
    Source: ours.
    """
    kind = _named(format)
    bits = code.astype(jnp.int32)
    fraction = bits & (2**kind.significand - 1)
    exponent = (bits >> kind.significand) & (2**kind.exponent - 1)
    normal = ((exponent - kind.bias + 127) << 23) | (fraction << (23 - kind.significand))
    x = jax.lax.bitcast_convert_type(normal, jnp.float32)
    step = _power_of_two(jnp.int32(kind.least_exponent - kind.significand))
    x = jnp.where(exponent == 0, fraction.astype(jnp.float32) * step, x)
    special = jnp.where(fraction == 0, jnp.inf, jnp.nan)
    x = jnp.where(exponent == 2**kind.exponent - 1, special, x)
    return jnp.where(bits >> 15 == 1, -x, x) if kind.signed else x


def _named(format):
    if format not in _FORMATS:
        raise ValueError(f"format is {format!r}, but must be one of {list(_FORMATS)}")
    return _FORMATS[format]


def _power_of_two(exponent):
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
