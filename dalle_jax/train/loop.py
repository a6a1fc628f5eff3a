"""The one training loop: every stage runs through it.

Source: ours.
"""

import dataclasses
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from dalle_jax.errors import UserError
from dalle_jax.image.sheet import save_png
from dalle_jax.parallel.mesh import (
    MeshConfig,
    gather_to_host,
    make_mesh,
    max_over_processes,
    place_batch,
)
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.parallel.processes import is_leader
from dalle_jax.train import checkpoint_diff
from dalle_jax.train import state as state_lib
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.lock import locked
from dalle_jax.train.log import MetricsLog, ProgressLog, installed_sinks
from dalle_jax.train.metrics_buffer import MetricsBuffer
from dalle_jax.train.stage import Stage
from dalle_jax.train.state import TrainState
from dalle_jax.train.train_step import make_ema_update, make_train_step

log = logging.getLogger(__name__)


@runtime_checkable
class DataIterator(Protocol):
    """Yields batches without end; its position is saved. Grain's iterators fit."""

    def __next__(self) -> Any:
        """Gives a dict of arrays, each with the batch B as first axis."""
        ...

    def get_state(self) -> dict:
        """Gives the position after the last batch, JSON-able."""
        ...

    def set_state(self, state: dict) -> None:
        """Goes to a position, so that the next batch is the one that followed it."""
        ...


MAY_CHANGE = (
    "steps",  # to train longer; a cosine over the whole run then changes what remains of it
    "log_every",
    "save_every",
    "evaluate_every",
    "sheet_every",
    "max_to_keep",
    "ema_on_host",
    "seed",  # other batches from there on; parameters and keys are those of the checkpoint
    "mesh",  # the same but for rounding; with PowerSGD, groups get equal parts of the error
)
"""Fields of `LoopConfig` that may differ between a checkpoint and the run that goes on with it."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a stage trains, and how often it logs, saves and evaluates."""

    steps: int
    """Steps in all."""
    log_every: int = 50
    """Steps between two lines in metrics.jsonl, each with means over those steps."""
    save_every: int = 500
    """Steps between two checkpoints."""
    evaluate_every: int | None = 500
    """Steps between two evaluations on held-out data; None for none."""
    sheet_every: int | None = 500
    """Steps between two contact sheets of samples; None for none."""
    max_to_keep: int = 3
    """Newest checkpoints to keep."""
    accumulation_steps: int = 1
    """Micro-batches per step: memory falls by this factor, the batch stays the same."""
    ema_every: int = 1
    """Steps between two updates of the EMA of the parameters."""
    ema_decay: float = 0.999
    """Decay of the EMA at each of its updates, in [0, 1)."""
    ema_on_host: bool = False
    """Keep the EMA in the memory of the CPUs, as the paper does; its arrays visit the devices one
    by one when it is updated."""
    seed: int = 0
    """Seed of the initial parameters and of all noise in training."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How the state and the batch are sharded over devices."""
    powersgd: PowerSGDConfig = dataclasses.field(default_factory=PowerSGDConfig)
    """How groups of the mesh compress gradients; off without a rank."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int) and field.name not in ("seed", "ema_on_host")
            if is_number and value < 1:
                raise UserError(f"{field.name} is {value}, but must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but must lie in 0..{2**32 - 1}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}, but must lie in [0, 1)")


def train(
    stage: Stage,
    iterator: DataIterator,
    *,
    config: LoopConfig,
    workdir: str | Path,
    settings: dict,
    defaults: dict | None = None,
    may_change: Sequence[str] = (),
) -> TrainState:
    """Trains a stage for `config.steps` steps, or resumes an earlier call.

    It writes checkpoints/, metrics.jsonl and sheets/ into `workdir`. A call with the same arguments
    resumes from the newest undamaged checkpoint and ends, on the same machine, in exactly the state
    of an unbroken run. SIGTERM and SIGINT save at the next step and then raise SystemExit with 128
    + the signal's number; a second one is handled as before this call.

    Several processes call it with the same arguments, each with its own part of the batches; they
    write checkpoints together, and process 0 the rest. A signal to one of them stops all.

    Args:
      stage: what to train.
      iterator: batches for it, at their beginning; its position is set on resume.
      config: lengths and intervals, in steps; `MAY_CHANGE` says what may differ between calls.
      workdir: folder of this run and stage alone.
      settings: of the run, JSON-able; saved with every checkpoint.
      defaults: what settings stand for that a checkpoint lacks, since it is older than they are;
        nested as `settings`.
      may_change: dotted names in settings that a resumed run need not share with its checkpoint.
    Returns:
      The state after the last step.
    Raises:
      NonFiniteError: if the loss or another metric is not finite.
      CheckpointError: if there are checkpoints, but none that is undamaged and fits; if the workdir
        cannot be written, or another run uses it; or if three saves in a row, or the last one,
        failed.
      SystemExit: after a signal.
    """
    workdir = Path(workdir)
    settings = {"stage": stage.name} | settings
    fixed = checkpoint_diff.without(settings, may_change)
    mesh = make_mesh(config.mesh)
    rank = config.powersgd.rank
    groups = None if rank is None else PowerSGDGroups(config.powersgd, mesh)
    init, key = partial(state_lib.init_state, stage, groups=groups), jax.random.key(config.seed)
    shapes = jax.eval_shape(init, key)
    shardings = state_lib.state_shardings(
        shapes, mesh, stage.rules, groups, ema_on_host=config.ema_on_host
    )
    one_process = jax.process_count() == 1
    with (
        locked(workdir),
        Checkpoints(workdir / "checkpoints", config.max_to_keep) as checkpoints,
        _Signals() as signals,
    ):
        checkpoints.prepare(shapes)
        step = stop = 0
        template = state_lib.checkpoint_shapes(shapes, shardings, groups)
        if restored := checkpoints.restore(template, settings=fixed, defaults=defaults):
            step, saved, position, _ = restored
            state = state_lib.from_checkpoint(saved, shardings, groups)
            iterator.set_state(position)
            log.info("%s goes on from step %d of %s", stage.name, step, checkpoints.folder)
        else:
            state = jax.jit(init, out_shardings=shardings)(key)
            if (params := stage.init_from_data(state.params)) is not state.params:
                state = state_lib.with_params(state, shardings, params)
        train_step = make_train_step(
            stage,
            shardings=shardings,
            groups=groups,
            accumulation_steps=config.accumulation_steps,
            ema_every=None if config.ema_on_host else config.ema_every,
            ema_decay=config.ema_decay,
        )
        update_ema = make_ema_update(shardings, decay=config.ema_decay)
        metrics_log = MetricsLog(
            workdir / "metrics.jsonl",
            stage=stage.name,
            step=step,
            sinks=installed_sinks(workdir, step=step),
        )
        buffer = MetricsBuffer(checkpoints)
        with ProgressLog(stage.name, step=step, steps=config.steps) as progress:
            while step < config.steps:
                batch = place_batch(mesh, _next_batch(iterator, step, config.steps))
                state, metrics = train_step(state, batch)
                step += 1
                if config.ema_on_host and step % config.ema_every == 0:
                    state = update_ema(state)
                signal_ = None if one_process else max_over_processes(mesh, signals.caught)
                examples = len(jax.tree.leaves(batch)[0])
                buffer.add(step, metrics, examples=examples, signal=signal_)
                progress.advance(step)
                checkpoints.check()
                last = step == config.steps

                if last or step % config.log_every == 0:
                    means = buffer.summarize()
                    metrics_log.write(step, means)
                    progress.report(step, means)

                # Read once: a signal after the save waits for the next. Of several processes all
                # see the signal of one at the same step, in the metrics of the same step.
                stop = signals.caught if one_process else buffer.signal
                if last or stop or step % config.save_every == 0:
                    buffer.read_all()  # a state whose metrics are not finite is never saved
                    saved = state_lib.to_checkpoint(state, groups)
                    checkpoints.save(step, saved, iterator.get_state(), settings)
                    del saved  # the sum of the error buffers is as large as the kernels
                if stop:
                    break

                evaluates = _due(step, config.evaluate_every, last)
                makes_sheet = _due(step, config.sheet_every, last)
                with buffer.paused():
                    if evaluates or makes_sheet:
                        ema_params = gather_to_host(state_lib.on_devices(state).ema_params)
                    if evaluates:
                        scores = {k: float(v) for k, v in stage.evaluate(ema_params).items()}
                        metrics_log.write(step, {f"eval/{k}": v for k, v in scores.items()})
                        progress.say(step, "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
                    if makes_sheet:
                        sheet = stage.sheet(ema_params)
                        if sheet is not None and is_leader():
                            _save_sheet(workdir / "sheets" / f"{stage.name}-{step:06d}.png", sheet)
        if stop := stop or signals.caught:  # the latter after the last step
            checkpoints.wait()
            log.info("%s saved step %d and stops", stage.name, step)
            raise SystemExit(128 + stop)
        return state_lib.on_devices(state)


def _due(step: int, every: int | None, last: bool) -> bool:
    return every is not None and (last or step % every == 0)


def _save_sheet(path: Path, sheet: Any) -> None:
    try:
        save_png(path, sheet)
    except OSError as error:  # a sheet is not worth a run
        log.warning("%s could not be written (%s); training goes on", path, error.strerror)


def _next_batch(iterator: DataIterator, step: int, steps: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"the data ended after step {step} of {steps}; a training iterator has to repeat"
        ) from None


class _Signals:
    """Notes the first SIGTERM or SIGINT; a second one goes to the handler before this one."""

    def __init__(self):
        self.caught = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, _) -> None:
        self.caught = number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
