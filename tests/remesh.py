"""A checkpoint that is written on one mesh of 8 devices and read on another.

For parallel/test_processes.py. Arguments: WORKDIR PORT INDEX COUNT. One process alone writes step 1
on data=8; of several each reads it on data=2 x fsdp=4, and all write it again as step 2, which one
of them cannot at the first three tries: once at the beginning, twice at the end.
JAX_NUM_CPU_DEVICES has to say how many of the devices are this process's.
"""

import errno
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as Spec

from dalle_jax.parallel.mesh import MeshConfig, gather_to_host, make_mesh
from dalle_jax.parallel.processes import ProcessConfig, join
from dalle_jax.parallel.sharding_rules import shardings
from dalle_jax.train import manifest
from dalle_jax.train import state as state_lib
from dalle_jax.train.checkpoint import CheckpointError, Checkpoints
from dalle_jax.train.stage import Stage


class Toy(Stage):
    name = "remesh"
    optimizer = optax.with_extra_args_support(optax.adamw(1e-2))
    rules = (("in", Spec(None, "fsdp")), ("out", Spec("fsdp")))

    def init(self, key):
        key_in, key_out = jax.random.split(key)
        return {"in": jax.random.normal(key_in, (4, 8)), "out": jax.random.normal(key_out, (8,))}

    def loss(self, params, batch, key, step):
        return jnp.sum(params["in"] @ params["out"]), {}


def created():
    """A state of which no two arrays are equal."""
    state = state_lib.init_state(Toy(), jax.random.key(0))
    double = partial(jax.tree.map, lambda x: 2 * x)
    moments = jax.tree.map(lambda x: x + 3, state.opt_state)
    return state.replace(
        step=state.step + 1, ema_params=double(state.ema_params), opt_state=moments
    )


def on_mesh(config):
    placed = shardings(jax.eval_shape(created), make_mesh(config), Toy.rules)
    return jax.jit(created, out_shardings=placed)(), placed


def readable(state):
    """Its values on the host, of all processes."""
    return gather_to_host(state.replace(key=jax.random.key_data(state.key)))


def main(folder, port, index, count):
    if count > 1:
        join(
            ProcessConfig(
                coordinator_address=f"127.0.0.1:{port}", num_processes=count, process_id=index
            )
        )
    assert jax.device_count() == 8
    with Checkpoints(folder) as checkpoints:
        if count == 1:
            state, _ = on_mesh(MeshConfig(data=8))
            checkpoints.save(1, state, {}, {})
        wanted, placed = on_mesh(MeshConfig(data=2, fsdp=4))
        _, state, _, _ = checkpoints.restore(wanted)
        for x, place in zip(*map(jax.tree.leaves, (state, placed)), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
        chex.assert_trees_all_equal(readable(state), readable(wanted))
    if count > 1:
        _try_in_vain(folder, state, index, count)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(2, state, {}, {})


def _try_in_vain(folder, state, index, count):
    checkpoints = Checkpoints(folder)
    write = manifest.write
    for room, failing in (("_try_to_write", count - 1), ("write", count - 1), ("write", 0)):
        checkpoints.check()
        if index == failing:
            setattr(manifest if room == "write" else checkpoints, room, _no_room)
        checkpoints.save(2, state, {}, {})
        assert checkpoints.newest() == 1
        manifest.write = write
        checkpoints.__dict__.pop("_try_to_write", None)
    try:
        checkpoints.check()
    except CheckpointError as error:
        assert ("No space left" if index == 0 else "process 0 could not save") in str(error)
        return
    raise AssertionError("the third failure in a row ends all")


def _no_room(*_):
    raise OSError(errno.ENOSPC, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "checkpoints", *map(int, sys.argv[2:5]))
