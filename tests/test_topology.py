import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import UserError
from dalle_jax.planner import topology

has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed"
)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x", "v5e:2x2x2", "v5p:4x4", "v4:3x2x1"])
def test_a_topology_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"topology is '{name}'"):
        topology.tpu_devices(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install dalle_jax\[tpu\]"):
        topology.tpu_devices("v5e:2x2")


@has_compiler
@pytest.mark.parametrize("name, count", [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x2", 8)])
def test_a_slice_has_a_device_for_each_chip(name, count):
    assert len(topology.tpu_devices(name)) == count


@has_compiler
@pytest.mark.slow
def test_a_program_over_a_slice_says_what_its_devices_hold():
    mesh = Mesh(np.asarray(topology.tpu_devices("v5e:2x2")).ravel(), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=place)
    compiled = jax.jit(lambda x: x - x.sum(), out_shardings=place).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 4
    assert "all-reduce" in compiled.as_text()
