"""Small number formats, simulated: float32 arrays that hold only what such a format can hold.

A format is named by its bits as the paper does, sign-exponent-significand. The paper keeps Adam's
mean in 1-6-9 and its variance in 0-6-10, PowerSGD's arrays and what is sent of them in 1-6-9. As
in IEEE formats the lowest exponent code holds zero and subnormals, the highest infinity and NaN.

Source: Ramesh et al. 2021, appendix D; biases as below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


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


def _named(format):
    if format not in _FORMATS:
        raise ValueError(f"format is {format!r}, but must be one of {list(_FORMATS)}")
    return _FORMATS[format]


def _power_of_two(exponent):
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
