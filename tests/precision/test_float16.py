"""Products of half precision against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.precision.float16 import product

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 8)).astype(np.float16)
KERNEL = RNG.normal(size=(8, 4)).astype(np.float32)
HALF = KERNEL.astype(np.float16).astype(float)


@jax.jit
def forward_and_backward(x, kernel, dy):
    y, backward = jax.vjp(product, x, kernel)
    return y, *backward(dy)


def test_product_and_gradients_are_those_of_rounded_inputs():
    dy = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    y, dx, dkernel = forward_and_backward(*map(jnp.asarray, (X, KERNEL, dy)))
    dy = dy.astype(np.float16).astype(float)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.float16, jnp.float32)
    np.testing.assert_allclose(y, X @ HALF, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, (dy @ HALF.T).astype(np.float16), rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(dkernel, np.einsum("BTm,BTn->mn", X, dy), rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients_of_kernels_are_summed_in_float32_unless_asked_otherwise():
    x = jnp.asarray(RNG.integers(1, 4, (1, 300, 2)), jnp.bfloat16)
    dy = jnp.ones((1, 300, 3))
    exact = np.broadcast_to(np.asarray(x, float).sum(1).T, (2, 3))  # about 600: 8 bits are too few
    gradients = {}
    for sums in (jnp.float32, jnp.bfloat16):
        _, backward = jax.vjp(lambda k, sums=sums: product(x, k, sums), jnp.ones((2, 3)))
        (gradients[sums],) = backward(dy)
    np.testing.assert_array_equal(gradients[jnp.float32], exact)
    rounded = exact.astype(jnp.bfloat16).astype(float)
    assert (rounded != exact).any()
    np.testing.assert_array_equal(gradients[jnp.bfloat16], rounded)


def test_a_kernel_gets_gradients_beyond_float16():
    dy = np.full((2, 3, 4), 60_000, np.float32)
    _, _, dkernel = forward_and_backward(*map(jnp.asarray, (np.ones_like(X), KERNEL, dy)))
    np.testing.assert_allclose(dkernel, np.full((8, 4), 6 * 60_000), rtol=1e-3)


def test_sums_stay_in_range_on_the_way():
    dy = np.full((2, 3, 4), 60_000, np.float32)
    dy[..., 2:] *= -1
    _, dx, _ = forward_and_backward(*map(jnp.asarray, (X, np.ones_like(KERNEL), dy)))
    np.testing.assert_array_equal(dx, np.zeros_like(X))  # 60,000 + 60,000 is no float16


def test_a_gradient_that_is_no_float16_is_infinite():
    dy = np.full((2, 3, 4), 70_000, np.float32)
    *_, dkernel = forward_and_backward(*map(jnp.asarray, (np.ones_like(X), KERNEL, dy)))
    assert not np.isfinite(dkernel).any()
