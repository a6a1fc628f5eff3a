"""The VQ-GAN: published sizes, the release's conventions, and its quantiser written out."""

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.vqgan import (
    VQGAN,
    VQGANConfig,
    codes_and_errors,
    decode,
    init_params,
    nearest,
    straight_through,
    to_uint8,
)
from dalle_jax.models.vqgan_blocks import (
    Attention,
    Downsample,
    Norm,
    Upsample,
    fold,
    inverse_haar,
    unfold,
)

SMALL = VQGANConfig(
    width=4, multipliers=(1, 2), blocks_per_group=1, attention=(), z_width=4, codes=5, code_width=3
)


def shapes(config, px):
    image = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(VQGAN(config).init, key, image)["params"]


@cache
def drawn(config):
    return jax.jit(partial(init_params, config))


@cache
def apply(config, method):
    return jax.jit(partial(VQGAN(config).apply, method=method))


def names(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in tree}


def test_published_size_has_the_released_parameter_count():
    leaves = jax.tree.leaves(shapes(VQGANConfig(codes=16384), 32))
    assert sum(leaf.size for leaf in leaves) == 76_073_859


def test_fold_puts_each_square_of_pixels_into_one_position():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert fold(x, 2)[0].tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[8, 9, 12, 13], [10, 11, 14, 15]],
    ]
    x = jnp.arange(2.0 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    chex.assert_trees_all_equal(unfold(fold(x, 3), 3), x)


def test_wavelets_are_sums_and_differences_of_the_pixels_of_a_square():
    square = np.array([[1.0, 2.0], [5.0, 11.0]])  # of one colour
    (a, b), (c, d) = square
    waves = np.array([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]) / 2
    x = np.zeros((1, 1, 1, 12), np.float32)
    x[0, 0, 0, 1] = waves[0]  # the means of all colours come first
    x[0, 0, 0, 6:9] = waves[1:]  # then the differences of each
    image = np.asarray(inverse_haar(jnp.asarray(x)))
    np.testing.assert_allclose(image[0, :, :, 1], square)
    assert not image[..., [0, 2]].any()


def test_a_network_with_wavelets_sees_the_means_of_squares_and_makes_both_sides_twice_as_long():
    config = dataclasses.replace(SMALL, wavelets=True)
    assert config.factor == 2 * SMALL.factor
    params = drawn(config)(jax.random.key(0))
    small = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (1, 4, 4, 3)), jnp.float32)
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    z, wanted = (
        apply(c, "encode")({"params": params}, x) for c, x in ((config, large), (SMALL, small))
    )
    np.testing.assert_allclose(z, wanted, atol=1e-6)
    codes = jnp.zeros((1, 4, 4), int)
    assert jax.eval_shape(partial(decode, config), params, codes).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="patch is 2; with wavelets it must be 1"):
        dataclasses.replace(config, patch=2)


def test_patches_multiply_the_factor(key):
    config = dataclasses.replace(SMALL, patch=2)
    assert config.factor == 4
    params = jax.eval_shape(drawn(config), key)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)
    codes, _ = jax.eval_shape(partial(codes_and_errors, config), params, images)
    chex.assert_shape(codes, (2, 2, 2))
    chex.assert_shape(jax.eval_shape(partial(decode, config), params, codes), (2, 8, 8, 3))


def test_parameters_have_the_releases_names():
    found = names(jax.tree_util.tree_leaves_with_path(shapes(VQGANConfig(), 32)))
    assert {
        "encoder/conv_in/kernel",
        "encoder/down_0/downsample/conv/bias",
        "encoder/down_2/block_0/nin_shortcut/kernel",
        "encoder/down_4/attn_1/proj_out/kernel",
        "encoder/mid/attn_1/norm/scale",
        "decoder/up_4/upsample/conv/kernel",
        "decoder/up_4/attn_2/q/kernel",
        "decoder/up_0/block_2/conv2/kernel",
        "decoder/norm_out/bias",
        "quant_conv/kernel",
        "post_quant_conv/bias",
        "quantize/embedding",
    } <= found
    assert not any("down_4/downsample" in name or "up_0/upsample" in name for name in found)


def test_halving_has_zeros_at_the_right_and_the_bottom_alone():
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    y = Downsample().apply({"params": params}, x)
    # sums over rows 0-2 and 2-3, columns 0-2 and 2-3
    expected = [[0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11], [66, 50]]
    np.testing.assert_array_equal(y[0, :, :, 0], expected)


def test_doubling_copies_each_pixel_before_it_convolves():
    x = jnp.array([[1.0, 2.0]])[None, :, :, None]
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 0].set(1)  # the left neighbour
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
    y = Upsample().apply({"params": params}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 1, 1, 2], [0, 1, 1, 2]])


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (128, 32), (256, 32)])
def test_norm_is_over_groups_of_at_least_four_channels_and_32_groups_at_most(channels, groups):
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (1, 2, 2, channels)), jnp.float32)
    params = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
    parts = np.split(np.asarray(x), groups, axis=-1)
    expected = [(part - part.mean()) / np.sqrt(part.var() + 1e-6) for part in parts]
    y = Norm().apply({"params": params}, x)
    np.testing.assert_allclose(y, np.concatenate(expected, -1), rtol=1e-4, atol=1e-5)


def test_attention_without_queries_adds_the_mean_of_all_cells():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 4)), jnp.float32)
    zero = {"kernel": jnp.zeros((1, 1, 4, 4)), "bias": jnp.zeros(4)}
    same = zero | {"kernel": jnp.eye(4)[None, None]}
    norm = {"scale": jnp.zeros(4), "bias": jnp.arange(4.0)}
    params = {"norm": norm, "q": zero, "k": same, "v": same, "proj_out": same}
    y = Attention().apply({"params": params}, x)
    np.testing.assert_allclose(y - x, jnp.broadcast_to(jnp.arange(4.0), x.shape), atol=1e-6)


def test_each_cell_takes_the_nearest_code_and_the_first_of_equals():
    table = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    z = jnp.array([[[[1.0, 0.0], [3.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]]]])
    codes, distances = nearest(z, table)
    np.testing.assert_array_equal(codes[0], [[0, 1], [2, 0]])  # (2, 0) lies in the middle of two
    np.testing.assert_allclose(distances[0], [[1, 2], [1, 4]])


def test_gradients_pass_straight_through_to_the_features():
    z, entries = jnp.array([1.0, 2.0]), jnp.array([5.0, -1.0])

    def f(z, entries):
        return jnp.sum(straight_through(z, entries) ** 2)

    value, (to_z, to_entries) = jax.value_and_grad(f, (0, 1))(z, entries)
    assert value == 26
    np.testing.assert_array_equal(to_z, 2 * entries)
    np.testing.assert_array_equal(to_entries, [0, 0])


def test_codes_come_with_their_squared_distance_in_float16(key):
    params = drawn(SMALL)(key)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    codes, errors = jax.jit(codes_and_errors, static_argnums=0)(SMALL, params, images)
    z = apply(SMALL, "encode")({"params": params}, np.float32(images) / 127.5 - 1)
    table = np.asarray(params["quantize"]["embedding"])
    all_distances = np.square(np.asarray(z)[..., None, :] - table).sum(-1)
    chex.assert_shape((codes, errors), (2, 4, 4))
    assert errors.dtype == jnp.float16
    np.testing.assert_array_equal(codes, all_distances.argmin(-1))
    np.testing.assert_allclose(errors, all_distances.min(-1), rtol=2e-3)


def test_decoding_codes_equals_decoding_their_entries(key):
    params = drawn(SMALL)(key)
    codes = jnp.arange(4).reshape(1, 2, 2)
    entries = params["quantize"]["embedding"][codes]
    of_codes, of_entries = (apply(SMALL, "decode")({"params": params}, z) for z in (codes, entries))
    chex.assert_shape(of_codes, (1, 4, 4, 3))
    chex.assert_trees_all_equal(of_codes, of_entries)


def test_pixels_are_rounded_and_kept_in_range():
    pixels = jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1).repeat(3, -1)
    np.testing.assert_array_equal(to_uint8(pixels)[:, 0, 0, 0], [0, 0, 128, 255, 255])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 0}, "codes is 0; it must be at least 1"),
        ({"multipliers": ()}, "groups is 0; it must be at least 1"),
        ({"width": 6}, "a multiplier is 6; it must be a multiple of 4"),
        ({"width": 132}, "a multiplier is 132; .* from 128 on of 32"),
        ({"attention": (3, 16)}, r"at the factors \[3\], but .* by \[1, 2, 4, 8, 16\]"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**changes)


def test_images_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="images of 5x5 pixels; .* multiple of 2"):
        shapes(SMALL, 5)
