"""Rounding to small formats against tables written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.precision import formats
from dalle_jax.precision.formats import largest, round_to

STEP = 2.0**-9  # between 1 and 2 in 1-6-9
SMALLEST = 2.0**-67


def rounded(values, format="1-6-9"):
    """One shape, so that it compiles once a format."""
    padded = np.zeros(4096, np.float32)
    padded[: len(values)] = values
    return np.asarray(_round(jnp.asarray(padded), format))[: len(values)]


_round = jax.jit(round_to, static_argnums=1)


def spread(*, low, high, seed=0):
    """Numbers of many sizes between two powers of two."""
    rng = np.random.default_rng(seed)
    return (2.0 ** rng.uniform(low, high, 4096)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 0.0),
        (1.0, 1.0),
        (1 + STEP, 1 + STEP),
        (1 + 0.49 * STEP, 1.0),
        (1 + 0.51 * STEP, 1 + STEP),
        (1 + 0.5 * STEP, 1.0),  # a tie goes to the even significand, here below
        (1 + 1.5 * STEP, 1 + 2 * STEP),  # and here above
        (2 - 0.5 * STEP, 2.0),  # into the next power of two
        (-3.1416, -3.140625),
        (15.984375, 15.984375),  # the largest: (2 - 2**-9) * 2**3
        (15.99, 15.984375),
        (15.9921875, np.inf),  # half a step beyond it
        (-15.9921875, -np.inf),
        (1e30, np.inf),
        (-np.inf, -np.inf),
        (np.nan, np.nan),
        (2.0**-58, 2.0**-58),  # the smallest normal
        (2.0**-58 - SMALLEST, 2.0**-58 - SMALLEST),  # the largest subnormal
        (3.4 * SMALLEST, 3 * SMALLEST),
        (0.51 * SMALLEST, SMALLEST),
        (0.5 * SMALLEST, 0.0),  # a tie, and zero is even
        (1e-30, 0.0),
        (1e-42, 0.0),  # no normal number of float32
    ],
)
def test_table_of_1_6_9(x, expected):
    np.testing.assert_array_equal(rounded([x]), np.float32([expected]))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 0.0),
        (5.0, 5.0),  # Adam's variance is clipped here
        (1 + 2.0**-10, 1 + 2.0**-10),
        (1 + 2.0**-11, 1.0),
        (7.99609375, 7.99609375),  # the largest: (2 - 2**-10) * 2**2
        (7.999, np.inf),
        (2.0**-69, 2.0**-69),  # the smallest subnormal
        (2.0**-70, 0.0),
        (-1e-9, np.nan),  # there is no sign
        (-np.inf, np.nan),
        (np.inf, np.inf),
        (np.nan, np.nan),
    ],
)
def test_table_of_0_6_10(x, expected):
    np.testing.assert_array_equal(rounded([x], "0-6-10"), np.float32([expected]))


def test_largest_numbers():
    assert largest("1-6-9") == (2 - 2**-9) * 2**3 == 15.984375
    assert largest("0-6-10") == (2 - 2**-10) * 2**2 == 7.99609375


@pytest.mark.parametrize(
    ("format", "low", "high", "bits"), [("1-6-9", -58, 3.99, 9), ("0-6-10", -59, 2.99, 10)]
)
def test_relative_error_of_normal_numbers_is_at_most_half_a_step(format, low, high, bits):
    x = spread(low=low, high=high)
    error = np.abs(rounded(x, format) - x) / x
    assert error.max() <= 2.0 ** -(bits + 1)
    assert error.max() > 0.9 * 2.0 ** -(bits + 1)  # and comes near it


@pytest.mark.parametrize("format", ["1-6-9", "0-6-10"])
def test_rounding_twice_is_rounding_once(format):
    once = rounded(spread(low=-75, high=5), format)
    np.testing.assert_array_equal(rounded(once, format), once)


def test_rounding_is_odd_and_rises():
    x = np.sort(spread(low=-75, high=5))
    np.testing.assert_array_equal(rounded(-x), -rounded(x))
    assert (np.diff(rounded(x)[rounded(x) < np.inf]) >= 0).all()


def test_float16_is_rounded_as_numpy_does(monkeypatch):
    ieee = formats._Format(True, 5, 10, bias=15)
    monkeypatch.setitem(formats._FORMATS, "1-5-10", ieee)
    x = np.concatenate([spread(low=-26, high=17)[:2048], -spread(low=-26, high=17, seed=1)[:2048]])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rounded(x, "1-5-10"), expected)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format is '1-5-2', but must be one of .*'1-6-9'"):
        largest("1-5-2")


@pytest.mark.parametrize(
    ("format", "x", "code"),
    [
        ("1-6-9", 1.0, 59 << 9),
        ("1-6-9", -1.5, 1 << 15 | 59 << 9 | 1 << 8),
        ("1-6-9", 15.984375, 62 << 9 | 511),
        ("1-6-9", 2.0**-58, 1 << 9),
        ("1-6-9", -3 * SMALLEST, 1 << 15 | 3),
        ("1-6-9", 0.0, 0),
        ("1-6-9", np.inf, 63 << 9),
        ("0-6-10", 5.0, 62 << 10 | 1 << 8),
        ("0-6-10", 7.99609375, 62 << 10 | 1023),
        ("0-6-10", 7 * 2.0**-69, 7),
    ],
)
def test_bits_of_numbers_written_out(format, x, code):
    found = formats.encode(jnp.float32([x]), format)
    assert found.dtype == jnp.uint16
    assert int(found[0]) == code
    assert float(formats.decode(found, format)[0]) == np.float32(x)


@pytest.mark.parametrize("format", ["1-6-9", "0-6-10"])
def test_all_65536_bits_come_back(format):
    codes = jnp.arange(2**16, dtype=jnp.uint16)
    numbers = formats.decode(codes, format)
    again = np.asarray(formats.encode(numbers, format))
    known = ~np.isnan(np.asarray(numbers))
    np.testing.assert_array_equal(again[known], np.asarray(codes)[known])
    assert np.isnan(np.asarray(formats.decode(jnp.asarray(again[~known]), format))).all()
    np.testing.assert_array_equal(np.asarray(round_to(numbers, format))[known], numbers[known])
