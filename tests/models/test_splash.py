from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dalle_jax.models.attention import dense
from dalle_jax.models.masks import attention_mask
from dalle_jax.models.splash import blocks, share_computed, splash

SIZES = {"text_length": 7, "grid": 12, "kernel": 5}  # 151 positions, two blocks of 128


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_splash_equals_dense_attention_and_so_do_its_gradients(kind):
    rng = np.random.default_rng(0)
    T = SIZES["text_length"] + SIZES["grid"] ** 2
    shape = (4, 1, T, 2, 8)
    query, key, value, weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = attention_mask(kind, **SIZES)

    def gradients(attend):
        def weighted(*qkv):
            seen = attend(*qkv)
            return (seen * weight).sum(), seen

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    found, seen = gradients(partial(splash, kind=kind, **SIZES, interpret=True))
    wanted, expected = gradients(partial(dense, mask=mask))
    assert_allclose(seen, expected, atol=2e-6)
    for gradient, true in zip(found, wanted, strict=True):
        assert_allclose(gradient, true, atol=1e-5)


def test_padding_sees_itself_and_nothing_sees_it():
    _, mask = blocks("row", **SIZES)
    assert mask.shape == (256, 256)
    np.testing.assert_array_equal(mask[151:], np.eye(256, dtype=bool)[151:])
    assert not mask[:151, 151:].any()


@pytest.mark.parametrize(
    "kind, share",
    [
        # of the paper's 10 x 10 blocks: 3 of text alone, two blocks of text for each of 8 of the
        # image; of the image the block itself and, but for columns, the ones before
        ("dense", 55 / 100),
        ("row", (3 + 16 + 8 + 7) / 100),
        ("column", (3 + 16 + 8) / 100),
        ("conv", (3 + 16 + 8 + 7 + 6) / 100),  # 5 rows of 32 and 5 cells back: 165 positions
    ],
)
def test_the_kernel_computes_the_blocks_with_a_visible_key(kind, share):
    assert share_computed(kind, text_length=256, grid=32) == pytest.approx(share)
