"""The real update, compiled for devices that are virtual, or not here at all, from shapes alone."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dalle_jax.parallel.mesh import BATCH, make_mesh
from dalle_jax.parallel.sharding_rules import shardings
from dalle_jax.planner.collectives import Collective, collectives
from dalle_jax.planner.plan import stage_of, state_shapes
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.train_step import make_train_step


def compiled_update(run: PriorRun) -> tuple[list[Collective], dict[str, int]]:
    """Compiles the update on the mesh of the run, for all devices of this process, from shapes.

    Args:
      run: the settings; nothing of them is made smaller.
    Returns:
      What its devices send, and bytes of one of them by this machine's compiler: "arguments", the
      state and the batch, and "temporaries". A CPU's compiler computes bfloat16 in float32 and
      does not mind to gather many layers at once, so that its temporaries are no forecast.
    """
    mesh = make_mesh(run.loop.mesh)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = _lowered(run, mesh).compile(compiler_options=options)
        (text,) = Path(folder).glob("*.after_spmd-partitioning.*")
        sent = collectives(text.read_text(), dict(mesh.shape))
    memory = compiled.memory_analysis()
    return sent, {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def compiled_for(run: PriorRun, devices: Sequence[Any]) -> dict[str, int]:
    """Compiles the update for devices that need not be here, from shapes.

    Args:
      run: the settings; nothing of them is made smaller.
      devices: as from `topology.tpu_devices`.
    Returns:
      Bytes of one device by the compiler of those devices: "arguments", the state and the batch;
      "temporaries"; and "program", its code. The compiler does not mind if they are more than a
      device has.
    Raises:
      UserError: if the number of devices does not fit the mesh of the run.
    """
    memory = _lowered(run, make_mesh(run.loop.mesh, devices)).compile().memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def _lowered(run, mesh):
    """The update on a mesh, before it is compiled."""
    stage, shapes = stage_of(run), state_shapes(run)
    if run.loop.ema_on_host:
        shapes = shapes.replace(ema_params=())
    places = shardings(shapes, mesh, stage.rules)
    batch = {
        "text": ((run.batch_size, run.model.text_length - 1), jnp.int32),
        "codes": ((run.batch_size, run.model.grid, run.model.grid), jnp.int32),
    }
    spread = NamedSharding(mesh, BATCH)
    batch = {name: jax.ShapeDtypeStruct(*x, sharding=spread) for name, x in batch.items()}
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    update = make_train_step(
        stage,
        accumulation_steps=run.loop.accumulation_steps,
        ema_every=None if run.loop.ema_on_host else run.loop.ema_every,
        ema_decay=run.loop.ema_decay,
    )
    with jax.set_mesh(mesh):
        placed = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
        return placed.lower(state, batch)
