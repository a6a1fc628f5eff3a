"""What the stages of a run will take on this machine, from a few updates that are timed.

The programs compiled here are those of the run, which finds them in the compilation cache.

Source: ours.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from dalle_jax.parallel.mesh import make_mesh, place_batch
from dalle_jax.planner.recipe import Run
from dalle_jax.train import state as state_lib
from dalle_jax.train.clip_stage import ClipRun, ClipStage
from dalle_jax.train.prior_stage import PriorStage
from dalle_jax.train.progressive_stage import ProgressiveRun, ProgressiveStage
from dalle_jax.train.stage import Stage
from dalle_jax.train.train_step import make_train_step
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

UPDATES = 3  # timed, after the one that compiles
FORWARD = 1 / 3  # of an update: the backward pass takes twice as long as the forward pass
PASSES = {"vqgan": 1, "prior": 1, "progressive": 2, "clip": 1}
"""Forward passes over an image that an evaluation makes; that of the progressive prior revises."""


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """One stage."""

    parameters: int
    """Numbers that are trained."""
    state_bytes: int
    """Of a checkpoint: parameters, their average, and the optimizer's moments."""
    compile_s: float
    """Seconds until the first update was done."""
    update_s: float
    """Seconds of an update after that, the median."""
    evaluation_s: float
    """Seconds of an evaluation on the held-out images."""

    def seconds(self, run: Run) -> float:
        """Of the whole stage, with its evaluations."""
        return self.fixed_seconds(run) + run.loop.steps * self.update_s

    def fixed_seconds(self, run: Run) -> float:
        """Of all in it but the updates: compiling and evaluations."""
        evaluations = math.ceil(run.loop.steps / run.loop.evaluate_every)
        return self.compile_s + evaluations * self.evaluation_s

    def disk_bytes(self, run: Run) -> int:
        """Of its checkpoints, while one more than is kept is being written, and of its model."""
        return self.state_bytes * (run.loop.max_to_keep + 1) + 4 * self.parameters


def forecast_stage(run: Run, *, held_out: int) -> StageForecast:
    """Times a few updates of a stage on numbers drawn at random.

    Args:
      run: its settings.
      held_out: images that it is evaluated on.
    """
    stage, mesh = _stage(run), make_mesh(run.loop.mesh)
    init, key = partial(state_lib.init_state, stage), jax.random.key(run.loop.seed)
    shapes = jax.eval_shape(init, key)
    shardings = state_lib.state_shardings(shapes, mesh, stage.rules)
    step = make_train_step(
        stage,
        shardings=shardings,
        accumulation_steps=run.loop.accumulation_steps,
        ema_every=run.loop.ema_every,
        ema_decay=run.loop.ema_decay,
    )
    batch = place_batch(mesh, random_batch(run))
    times = [time.perf_counter()]
    state = jax.jit(init, out_shardings=shardings)(key)
    for _ in range(1 + UPDATES):
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter())
    update_s = float(np.median(np.diff(times)[1:]))
    per_image = FORWARD * PASSES[stage.name] * update_s / run.batch_size
    return StageForecast(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params)),
        state_bytes=sum(_bytes(x) for x in jax.tree.leaves(shapes)),
        compile_s=times[1] - times[0],
        update_s=update_s,
        evaluation_s=held_out * per_image,
    )


def random_batch(run: Run) -> dict[str, np.ndarray]:
    """A batch of what the stage learns from, drawn at random."""
    rng, B = np.random.default_rng(0), run.batch_size
    if isinstance(run, VQGANRun):
        return {"image": rng.integers(0, 256, (B, run.px, run.px, 3), np.uint8)}
    c = run.model
    if isinstance(run, ClipRun):
        text = rng.integers(0, c.text_vocabulary, (B, c.slots)).astype(np.int32)
        return {"image": rng.integers(0, 256, (B, c.px, c.px, 3), np.uint8), "text": text}
    cells = (B, c.grid, c.grid)
    return {
        "codes": rng.integers(0, c.codes, cells).astype(np.int32),
        "errors": rng.random(cells, np.float32),
        "text": rng.integers(0, c.text_vocabulary, (B, c.text_length - 1)).astype(np.int32),
    }


def peak_memory() -> int:
    """Most bytes that the first device, or on a CPU this process, has had in use so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if peak := stats.get("peak_bytes_in_use"):
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _stage(run: Run) -> Stage:
    if isinstance(run, ClipRun):
        return ClipStage(run, validation={})
    if isinstance(run, VQGANRun):
        return VQGANStage(run, init_images=_nothing, validation=_nothing)
    kind = ProgressiveStage if isinstance(run, ProgressiveRun) else PriorStage
    return kind(run, codec_model=None, tokenizer=None, validation=_nothing, captions=())


def _nothing() -> tuple[()]:
    """What a stage asks for that is not trained."""
    return ()


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)
