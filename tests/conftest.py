import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, so that no test needs a device

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)
