"""Schedules as written-out tables."""

import numpy as np
import pytest

from dalle_jax.optim.schedules import cosine, warm_up


@pytest.mark.parametrize(
    ("start", "end", "steps", "table"),
    [
        (0.0, 6.6, 5_000, {0: 0.0, 2_500: 3.3, 5_000: 6.6, 9_000: 6.6}),
        (1.0, 1 / 16, 150_000, {0: 1.0, 75_000: 17 / 32, 150_000: 1 / 16, 3_000_000: 1 / 16}),
        (1e-4, 1.25e-6, 1_200_000, {0: 1e-4, 400_000: 7.53125e-5, 1_200_000: 1.25e-6}),
    ],
)
def test_cosine_holds_the_papers_values(start, end, steps, table):
    schedule = cosine(start, end, steps)
    for step, value in table.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-5, atol=1e-9)


def test_cosine_of_no_length_is_its_end():
    assert float(cosine(1.0, 0.25, 0)(0)) == 0.25


def test_warm_up_rises_linearly_then_counts_from_zero():
    schedule = warm_up(4.5e-4, 5_000, cosine(4.5e-4, 0.0, 100))
    np.testing.assert_allclose(schedule(0), 0)
    np.testing.assert_allclose(schedule(2_500), 2.25e-4)
    np.testing.assert_allclose(schedule(5_000), 4.5e-4)
    np.testing.assert_allclose(schedule(5_050), 2.25e-4, rtol=1e-6)


def test_warm_up_alone_stays_at_its_peak():
    assert float(warm_up(0.5, 10)(1_000)) == 0.5
    assert float(warm_up(0.5, 0)(0)) == 0.5
