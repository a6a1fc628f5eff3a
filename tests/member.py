"""One of several processes that train together on 8 devices, for parallel/test_processes.py.

Arguments: WORKDIR PORT INDEX COUNT STEPS [PAUSE [KILL_AT]]. JAX_NUM_CPU_DEVICES has to say how many
of the devices are this one's. PAUSE is a number of seconds in every update; at step KILL_AT process
1 sends itself SIGKILL, once it has begun to save that step.
"""

import os
import signal
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as Spec

from dalle_jax.data.batches import ProcessSlice
from dalle_jax.parallel.mesh import MeshConfig
from dalle_jax.parallel.processes import ProcessConfig, join
from dalle_jax.train import checkpoint
from dalle_jax.train.loop import LoopConfig, train
from dalle_jax.train.stage import Stage

folder, port, index, count, steps = sys.argv[1], *map(int, sys.argv[2:6])
pause = float(sys.argv[6]) if len(sys.argv) > 6 else 0.0
kill_at = int(sys.argv[7]) if len(sys.argv) > 7 else None


class Member(Stage):
    name = "member"
    optimizer = optax.with_extra_args_support(optax.adamw(1e-2))
    rules = (("in", Spec(None, "fsdp")), ("out", Spec("fsdp")))

    def init(self, key):
        key_in, key_out = jax.random.split(key)
        return {"in": jax.random.normal(key_in, (4, 8)), "out": jax.random.normal(key_out, (8,))}

    def init_from_data(self, params):
        return jax.tree.map(lambda x: 0.5 * x, params)

    def loss(self, params, batch, key, step):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
        return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2), {}

    def evaluate(self, params):
        return {"sum": float(np.sum(params["in"]))}

    def sheet(self, params):
        return np.zeros((2, 3, 3), np.uint8)


class Paused:
    """Makes updates slow, so that a signal meets one."""

    def __init__(self, iterator):
        self._iterator = iterator

    def __next__(self):
        time.sleep(pause)
        return next(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


def data():
    order = ProcessSlice(grain.MapDataset.range(40).seed(1).shuffle().repeat(), 8, index, count)

    def example(i):
        return {"x": np.linspace(i, i + 1, 4, dtype=np.float32) / 40, "y": np.float32(i % 2)}

    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    examples = order.map(example).batch(8 // count)
    return Paused(iter(examples.to_iter_dataset(read)))


if kill_at is not None and index == 1:
    save = checkpoint.Checkpoints.save

    def killed(self, step, *rest):
        save(self, step, *rest)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpoints.save = killed

if count > 1:
    join(
        ProcessConfig(
            coordinator_address=f"127.0.0.1:{port}", num_processes=count, process_id=index
        )
    )
config = LoopConfig(
    steps=steps,
    log_every=1,
    save_every=4,
    evaluate_every=4,
    sheet_every=4,
    mesh=MeshConfig(fsdp=2),
)
train(Member(), data(), config=config, workdir=Path(folder), settings={"run": {}})
