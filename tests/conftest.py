import logging
import os
from importlib.metadata import version

# Before jax is imported: no test needs a device, nor touches compiled programs that a user keeps.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
# Compiling is most of the time: with little optimisation the suite takes half as long, and without
# XLA's newer emitters of fused kernels two thirds of what is left. XLA of jaxlib 0.11.2
# has no others.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11.1" else "",
    "--xla_cpu_parallel_codegen_split_count=1",
    os.environ.get("XLA_FLAGS", ""),
])  # fmt: skip

import jax
import pytest

from dalle_jax.generate.sampling import SamplingConfig

# It takes ints for floats and says itself what is wrong, before beartype would.
SamplingConfig.__init__ = getattr(SamplingConfig.__init__, "__wrapped__", SamplingConfig.__init__)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def _logging_left_as_found():
    """A program under test may send log lines to the terminal; the next test wants them back."""
    logger = logging.getLogger("dalle_jax")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
