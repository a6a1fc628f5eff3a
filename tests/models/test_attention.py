import chex
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models.attention import attend


def _qkv(seed, shape=(2, 5, 3, 4), dtype=jnp.float32):
    return (jax.random.normal(k, shape, dtype) for k in jax.random.split(jax.random.key(seed), 3))


def _causal(length):
    return jnp.tri(length, dtype=bool)


def test_attend_equals_a_loop_over_queries_in_float64():
    query, key, value = _qkv(0)
    mask = np.tri(5, dtype=bool)
    mask[4, 1] = mask[3, 0] = False
    got = attend(query, key, value, mask=jnp.asarray(mask))
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, t, n in np.ndindex(2, 5, 3):
        seen = mask[t]
        weights = np.exp(k[b, seen, n] @ q[b, t, n] / np.sqrt(4))
        expected = weights @ v[b, seen, n] / weights.sum()
        np.testing.assert_allclose(got[b, t, n], expected, atol=1e-5)


def test_one_query_against_longer_keys_equals_the_last_row():
    query, key, value = _qkv(1)
    full = attend(query, key, value, mask=_causal(5))
    last = attend(query[:, 4:], key, value, mask=jnp.ones((1, 5), bool))
    chex.assert_trees_all_close(last, full[:, 4:], atol=1e-6)


def test_a_query_that_sees_one_key_copies_its_value():
    query, key, value = _qkv(2)
    mixed = attend(query * 100, key, value, mask=jnp.eye(5, dtype=bool)[::-1])
    chex.assert_trees_all_close(mixed, value[:, ::-1], atol=1e-6)


def test_gradients_are_finite_and_zero_for_hidden_keys():
    query, key, value = _qkv(3)
    mask = jnp.array([[True, False, True, True, False]] * 5)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, mask=mask) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    chex.assert_tree_all_finite(gradients)
    for gradient in gradients[1:]:
        chex.assert_trees_all_equal(gradient[:, [1, 4]], jnp.zeros((2, 2, 3, 4)))
        assert jnp.all(jnp.abs(gradient[:, [0, 2, 3]]).sum((2, 3)) > 0)


def test_softmax_stays_float32_for_bfloat16_values():
    query, key, value = _qkv(4, dtype=jnp.bfloat16)
    got = attend(query, key, value, mask=_causal(5))
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)), mask=_causal(5))
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_close(got.astype(jnp.float32), exact, atol=2e-2)
