"""Convolution and max-pool against XLA's, whose gradients come from automatic differentiation."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from dalle_jax.models.convolution import convolve, kernel_gradient, max_pool


def plain(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


@partial(jax.jit, static_argnums=0)
def with_gradients(f, dy, *inputs):
    """What f gives, and gradients of its inputs from that of its output."""
    y, gradients = jax.vjp(f, *inputs)
    return y, gradients(dy)


def drawn(key, side, channels, features, shape=(2, 6, 5)):
    key_x, key_kernel, key_dy = jax.random.split(key, 3)
    return (
        jax.random.normal(key_x, (*shape, channels)),
        jax.random.normal(key_kernel, (side, side, channels, features)),
        jax.random.normal(key_dy, (*shape, features)),
    )


@pytest.mark.parametrize("side", [1, 3, 7])
@pytest.mark.parametrize(("channels", "features"), [(3, 8), (8, 3), (4, 4)])
def test_output_and_gradients_equal_the_plain_convolutions(key, side, channels, features):
    x, kernel, dy = drawn(key, side, channels, features)
    y, gradients = with_gradients(convolve, dy, x, kernel)
    expected, expected_gradients = with_gradients(plain, dy, x, kernel)
    chex.assert_trees_all_equal(y, expected)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("channels", "features"), [(3, 8), (8, 3)])
def test_kernel_gradient_as_products_equals_xlas_on_every_backend(key, channels, features):
    x, kernel, dy = drawn(key, 3, channels, features)
    _, (_, expected) = with_gradients(plain, dy, x, kernel)
    found = jax.jit(partial(kernel_gradient, side=3))(x, dy)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=2e-5)


def test_an_image_smaller_than_the_kernel_has_the_same_gradient(key):
    x, kernel, dy = drawn(key, 7, 3, 4, shape=(2, 2, 1))
    found, expected = (with_gradients(f, dy, x, kernel)[1] for f in (convolve, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=2e-5)


def test_only_a_cpu_makes_the_kernel_gradient_of_matrix_products(key):
    x, kernel, dy = drawn(key, 3, 4, 8)
    gradient = jax.jit(lambda x, kernel, dy: jax.vjp(convolve, x, kernel)[1](dy)[1])
    lowered = {
        platform: gradient.trace(x, kernel, dy).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "stablehlo.convolution" not in lowered["cpu"]
    assert lowered["cuda"].count("stablehlo.convolution") == 1
    assert "stablehlo.dot_general" not in lowered["cuda"]


def test_max_pool_and_its_gradient_equal_a_windows_greatest(key):
    key_x, key_dy = jax.random.split(key)
    x = jax.random.normal(key_x, (2, 6, 4, 3))
    dy = jax.random.normal(key_dy, (2, 3, 2, 3))

    def windows(x):
        return jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding="VALID"
        )

    found, expected = (with_gradients(f, dy, x) for f in (max_pool, windows))
    chex.assert_trees_all_equal(found, expected)


def test_of_equal_pixels_one_gets_the_gradient():
    x = jnp.array([[2.0, 2.0], [1.0, 2.0]])[None, :, :, None]
    (dx,) = jax.vjp(max_pool, x)[1](jnp.full((1, 1, 1, 1), 3.0))
    chex.assert_trees_all_equal(dx[0, :, :, 0], jnp.array([[3.0, 0.0], [0.0, 0.0]]))
