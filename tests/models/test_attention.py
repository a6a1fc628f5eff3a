from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.attention import _blocks, blocked, dense
from dalle_jax.models.masks import attention_mask


def _qkv(seed, shape=(2, 5, 3, 4), dtype=jnp.float32):
    return (jax.random.normal(k, shape, dtype) for k in jax.random.split(jax.random.key(seed), 3))


def _causal(length):
    return jnp.tri(length, dtype=bool)


def test_dense_equals_a_loop_over_queries_in_float64():
    query, key, value = _qkv(0)
    mask = np.tri(5, dtype=bool)
    mask[4, 1] = mask[3, 0] = False
    got = dense(query, key, value, mask=jnp.asarray(mask))
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, t, n in np.ndindex(2, 5, 3):
        seen = mask[t]
        weights = np.exp(k[b, seen, n] @ q[b, t, n] / np.sqrt(4))
        expected = weights @ v[b, seen, n] / weights.sum()
        np.testing.assert_allclose(got[b, t, n], expected, atol=1e-5)


def test_one_query_against_longer_keys_equals_the_last_row():
    query, key, value = _qkv(1)
    full = dense(query, key, value, mask=_causal(5))
    last = dense(query[:, 4:], key, value, mask=jnp.ones((1, 5), bool))
    chex.assert_trees_all_close(last, full[:, 4:], atol=1e-6)


def test_a_query_that_sees_one_key_copies_its_value():
    query, key, value = _qkv(2)
    mixed = dense(query * 100, key, value, mask=jnp.eye(5, dtype=bool)[::-1])
    chex.assert_trees_all_close(mixed, value[:, ::-1], atol=1e-6)


def test_gradients_are_finite_and_zero_for_hidden_keys():
    query, key, value = _qkv(3)
    mask = jnp.array([[True, False, True, True, False]] * 5)

    def loss(q, k, v):
        return jnp.sum(dense(q, k, v, mask=mask) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    chex.assert_tree_all_finite(gradients)
    for gradient in gradients[1:]:
        chex.assert_trees_all_equal(gradient[:, [1, 4]], jnp.zeros((2, 2, 3, 4)))
        assert jnp.all(jnp.abs(gradient[:, [0, 2, 3]]).sum((2, 3)) > 0)


def test_softmax_stays_float32_for_bfloat16_values():
    query, key, value = _qkv(4, dtype=jnp.bfloat16)
    got = dense(query, key, value, mask=_causal(5))
    exact = dense(*(x.astype(jnp.float32) for x in (query, key, value)), mask=_causal(5))
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_close(got.astype(jnp.float32), exact, atol=2e-2)


@pytest.mark.parametrize("kind", ["dense", "row", "column", "conv"])
@pytest.mark.parametrize(
    ("text_length", "grid", "kernel", "batch"), [(7, 5, 3, 2), (1, 4, 11, 1), (5, 8, 5, 1)]
)
def test_blocked_equals_dense_in_output_and_gradients(kind, text_length, grid, kernel, batch):
    sizes = {"text_length": text_length, "grid": grid, "kernel": kernel}
    mask = attention_mask(kind, **sizes)
    shape = (batch, text_length + grid * grid, 2, 4)
    query, key, value = _qkv(5, shape)
    cotangent = jnp.cos(jnp.arange(query.size)).reshape(shape)

    @jax.jit
    def both(query, key, value, cotangent):
        results = []
        for attend in (partial(dense, mask=mask), partial(blocked, kind=kind, **sizes)):
            seen, pull = jax.vjp(attend, query, key, value)
            results.append((seen, pull(cotangent)))
        return results

    expected, got = both(query, key, value, cotangent)
    chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_blocked_windows_hold_every_key_that_a_query_may_see():
    for kind in ("row", "column", "conv"):
        for grid, kernel in ((4, 3), (5, 11), (16, 11)):
            seen = attention_mask(kind, text_length=1, grid=grid, kernel=kernel)[1:, 1:]
            assert _blocks(kind, grid, kernel).mask.sum() == seen.sum()


def test_blocked_logits_grow_with_the_image_and_not_with_its_square():
    small, large = (
        {kind: _blocks(kind, grid, 11).mask.size for kind in ("row", "column", "conv")}
        for grid in (16, 32)
    )
    for kind in small:  # four times the cells, each with a window of twice the width
        assert large[kind] == 8 * small[kind]


def test_blocked_stays_finite_for_large_logits_and_bfloat16():
    query, key, value = _qkv(6, (1, 20, 2, 4), jnp.bfloat16)
    sizes = {"text_length": 4, "grid": 4}
    for kind in ("dense", "row", "column", "conv"):
        got = jax.jit(partial(blocked, kind=kind, **sizes))(query * 1000, key, value)
        assert got.dtype == jnp.bfloat16
        chex.assert_tree_all_finite(got)
        expected = dense(query * 1000, key, value, mask=attention_mask(kind, **sizes))
        chex.assert_trees_all_close(
            got.astype(jnp.float32), expected.astype(jnp.float32), atol=5e-2
        )
