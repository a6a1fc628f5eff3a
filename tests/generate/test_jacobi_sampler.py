import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate import autoregressive_sampler, jacobi_sampler
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.prior_config import PriorConfig

TINY = PriorConfig(
    width=16, depth=4, heads=2, text_vocabulary=11, text_length=4, grid=3, codes=7, kernel=3
)
TEXT = np.array([[1, 2, 3], [4, 12, 13]])


@pytest.fixture(scope="module")
def params():
    """Weights large enough for every code to change the next ones."""
    shapes = jax.eval_shape(
        AutoregressivePrior(TINY).init, jax.random.key(0), TEXT, jnp.zeros((2, 9), int)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes["params"]
    )


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.9, "guidance": 2.0}]
)
def test_passes_over_all_cells_give_the_codes_of_one_after_the_other(options, params):
    keys, sampling = jax.random.split(jax.random.key(1), 6), SamplingConfig(**options)
    codes, passes = jacobi_sampler.sample(TINY, params, TEXT, keys, sampling=sampling)
    wanted = autoregressive_sampler.sample(TINY, params, TEXT, keys, sampling=sampling)
    np.testing.assert_array_equal(codes, wanted)
    assert 2 < passes <= TINY.image_length + 1


def test_known_rows_are_kept_and_save_passes(params):
    keys = jax.random.split(jax.random.key(1), 2)
    known = np.full((2, 3, 3), TINY.codes)
    known[:, :2] = 5
    codes, passes = jacobi_sampler.sample(TINY, params, TEXT, keys, known=known)
    wanted = autoregressive_sampler.sample(
        TINY, params, TEXT, keys, prompt_codes=np.where(known == 7, 0, 5), keep_rows=2
    )
    np.testing.assert_array_equal(codes, wanted)
    assert passes <= 3 + 1, "three cells are left, and a last pass sees that nothing changes"
