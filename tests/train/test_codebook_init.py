"""The k-means start: every code means something before the first update."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.image.pixels import map_pixels
from dalle_jax.models.dvae import DVAE, DVAEConfig, init_params
from dalle_jax.train.codebook_init import kmeans_init

CONFIG = DVAEConfig(width=8, groups=3, blocks_per_group=1, codes=32, code_width=8)
drawn = jax.jit(partial(init_params, CONFIG))


@pytest.fixture
def images():
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    return noise.repeat(2, axis=1).repeat(2, axis=2)


@jax.jit
def codes(params, images):
    x = map_pixels(jnp.asarray(images, jnp.float32) / 255)
    return DVAE(CONFIG).apply({"params": params}, x, method="encode").argmax(-1)


def test_every_code_is_in_use_at_the_start(key, images):
    params = drawn(key)
    started = kmeans_init(key, params, CONFIG, images)
    assert len(np.unique(codes(params, images))) < 16
    assert len(np.unique(codes(started, images))) == 32


def test_the_tree_keeps_its_structure_and_is_deterministic(key, images):
    params = drawn(key)
    started = kmeans_init(key, params, CONFIG, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, started)
    chex.assert_trees_all_equal(started, kmeans_init(key, params, CONFIG, images))
    table = started["decoder"]["input"]["kernel"]
    assert float(jnp.square(table).mean()) == pytest.approx(1, rel=1e-5)


def test_too_few_images_are_refused(key):
    params = drawn(key)
    flat = np.full((4, 16, 16, 3), 255, np.uint8)
    with pytest.raises(ValueError, match="different cells, fewer than the 32 codes"):
        kmeans_init(jax.random.key(0), params, CONFIG, flat)
