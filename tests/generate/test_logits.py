import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate import logits as module
from dalle_jax.generate.logits import filter_logits, sample_logits

SHARES = [0.125, 0.5, 0.0625, 0.25, 0.0625]  # exact in binary, so that sums are too


def _kept(shares, **limits):
    logits = jnp.log(jnp.asarray(shares, jnp.float32))
    filtered = filter_logits(logits, **limits)
    kept = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[kept], logits[kept])  # what stays is unchanged
    return np.flatnonzero(kept).tolist()


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_exactly_k_and_the_lowest_of_a_tie(top_k, kept):
    assert _kept(SHARES, top_k=top_k) == kept


def test_top_k_of_equal_logits_keeps_the_first_k():
    assert _kept([0.25] * 4, top_k=3) == [0, 1, 2]


def test_top_k_above_the_codebook_keeps_all():
    assert _kept(SHARES, top_k=100) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.5, [1]),
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.8, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_code_that_crosses_p(top_p, kept):
    assert _kept(SHARES, top_p=top_p) == kept


def test_top_p_below_all_of_float32_keeps_the_likeliest_code():
    assert _kept(SHARES, top_p=1e-300) == _kept(SHARES, top_k=1)


def test_top_p_counts_shares_of_what_top_k_left():
    # of all, 0.6 needs codes 1 and 3; of the top two, whose shares are 2/3 and 1/3, code 1 will do
    assert _kept(SHARES, top_p=0.6) == [1, 3]
    assert _kept(SHARES, top_k=2, top_p=0.6) == [1]
    assert _kept(SHARES, top_k=2, top_p=0.7) == [1, 3]
    assert _kept(SHARES, top_k=2, top_p=1.0) == [1, 3]


def test_top_p_of_one_keeps_shares_below_float32_resolution():
    logits = jnp.array([0.0, -30.0, -60.0])
    np.testing.assert_array_equal(filter_logits(logits, top_p=1.0), logits)


def test_no_limit_changes_nothing():
    logits = jax.random.normal(jax.random.key(0), (2, 5))
    assert filter_logits(logits) is logits


def test_rows_of_a_batch_are_filtered_alone_with_traced_limits():
    logits = jax.random.normal(jax.random.key(1), (3, 2, 9))
    limits = {"top_k": jnp.int32(4), "top_p": jnp.float32(0.8)}
    together = jax.jit(filter_logits)(logits, **limits)
    assert set(np.isfinite(together).sum(-1).ravel().tolist()) <= {1, 2, 3, 4}
    for row in np.ndindex(3, 2):
        alone = filter_logits(logits[row], top_k=4, top_p=0.8)
        np.testing.assert_array_equal(together[row], alone)


def test_images_sampled_a_few_at_a_time_get_the_codes_of_the_whole_batch(monkeypatch):
    logits = jax.random.normal(jax.random.key(0), (4, 3, 5))
    keys = jax.random.split(jax.random.key(1), 4)
    whole, log_p = sample_logits(logits, keys, jnp.float32(1), None, None)
    monkeypatch.setattr(module, "NUMBERS", 2 * 3 * 5)
    parts, log_p_of_parts = sample_logits(logits, keys, jnp.float32(1), None, None)
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_allclose(log_p_of_parts, log_p, rtol=1e-6)
