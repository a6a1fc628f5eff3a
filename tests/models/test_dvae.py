"""The dVAE: published sizes, shapes, and the equivalences that its users rely on."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.dvae import DVAE, Block, DVAEConfig, init_params, to_uint8

SMALL = DVAEConfig(width=8, groups=3, blocks_per_group=1, codes=16, code_width=8)


drawn = jax.jit(partial(init_params, SMALL))
encode, decode = (jax.jit(partial(DVAE(SMALL).apply, method=name)) for name in ("encode", "decode"))


def parameters(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_size_has_the_released_parameter_counts():
    shapes = jax.eval_shape(DVAE(DVAEConfig()).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert parameters(shapes["params"]["encoder"]) == 53_786_240
    assert parameters(shapes["params"]["decoder"]) == 43_829_766


def test_published_size_makes_32_by_32_codes_of_256_pixels():
    model = DVAE(DVAEConfig())
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    logits = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode"), params, images)
    stats = jax.eval_shape(lambda p, x: model.apply(p, x, method="decode"), params, logits)
    chex.assert_shape(logits, (1, 32, 32, 8192))
    chex.assert_shape(stats, (1, 256, 256, 6))


def test_residual_gain_is_one_over_layers_squared_unless_given():
    assert DVAEConfig().gain == 1 / 64
    assert DVAEConfig(residual_gain=0.3).gain == 0.3


def test_weights_start_with_the_releases_deviation(key):
    params = jax.jit(partial(init_params, DVAEConfig(width=64, groups=2)))(key)
    conv = params["encoder"]["group_2_block_1"]["conv_1"]["kernel"]  # 3 3 64 32
    assert float(conv.std()) == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    chex.assert_trees_all_equal(params["decoder"]["output"]["bias"], jnp.zeros(6))
    config = DVAEConfig(width=8, groups=2, code_std=1.0)
    table = jax.jit(partial(init_params, config))(key)["decoder"]["input"]
    assert float(table["kernel"].std()) == pytest.approx(1.0, rel=0.02)


def test_a_block_that_enlarges_equals_the_block_on_an_enlarged_image(key):
    x = jax.random.normal(key, (2, 3, 3, 16))
    enlarging = Block(8, (1, 3, 3, 3), 0.5, enlarge=True)
    shapes = jax.eval_shape(enlarging.init, key, x)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype("f"), shapes)
    enlarged = x.repeat(2, axis=1).repeat(2, axis=2)
    expected = jax.jit(Block(8, (1, 3, 3, 3), 0.5).apply)(params, enlarged)
    found = jax.jit(enlarging.apply)(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_integer_codes_decode_as_their_one_hot_rows(key):
    params = {"params": drawn(key)}
    codes = jax.random.randint(key, (2, 3, 3), 0, SMALL.codes)
    hard = decode(params, codes)
    soft = decode(params, jax.nn.one_hot(codes, SMALL.codes))
    chex.assert_shape(hard, (2, 12, 12, 6))
    chex.assert_trees_all_equal(hard, soft)


def test_a_cells_logits_do_not_depend_on_far_pixels(key):
    x = jax.random.uniform(key, (1, 128, 128, 3), minval=0.1, maxval=0.9)
    params = {"params": drawn(key)}
    far = x.at[:, 64:].set(0.5)
    near, changed = (encode(params, y)[:, 0, 0] for y in (x, far))
    chex.assert_trees_all_close(near, changed, atol=1e-6)


def test_batch_of_one_equals_its_row_in_a_larger_batch(key):
    x = jax.random.uniform(key, (3, 8, 8, 3), minval=0.1, maxval=0.9)
    params = {"params": drawn(key)}
    whole = encode(params, x)
    chex.assert_trees_all_close(whole[1:2], encode(params, x[1:2]), atol=1e-5)


def test_to_uint8_undoes_the_pixel_map():
    pixels = np.arange(256, dtype=np.uint8)
    mapped = 0.8 * pixels / 255 + 0.1
    mu = np.log(mapped / (1 - mapped))
    stats = jnp.asarray(np.stack([mu] * 3 + [np.zeros(256)] * 3, -1), jnp.float32)[None, :, None]
    drawn = to_uint8(stats.reshape(1, 16, 16, 6))
    np.testing.assert_array_equal(np.asarray(drawn)[..., 0].ravel(), pixels)


def test_bad_sizes_are_refused(key):
    with pytest.raises(ValueError, match="width is 6; it must be a multiple of 4"):
        DVAEConfig(width=6)
    with pytest.raises(ValueError, match="codes is 0; it must be at least 1"):
        DVAEConfig(codes=0)
    with pytest.raises(ValueError, match="images of 6x6 pixels; .* multiple of 4"):
        DVAE(SMALL).init(key, jnp.zeros((1, 6, 6, 3)))
