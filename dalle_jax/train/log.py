"""What a run says: metrics.jsonl and other places for metrics, and a progress bar or plain lines.

Source: ours.
"""

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dalle_jax import atomic
from dalle_jax.parallel.processes import is_leader
from dalle_jax.terminal import console, say

log = logging.getLogger(__name__)


@runtime_checkable
class MetricsSink(Protocol):
    """Another place for metrics: the seam for TensorBoard, W&B and the like."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step; an OSError ends its part in the run, and no more."""
        ...


def installed_sinks(workdir: Path, *, step: int) -> list[MetricsSink]:
    """Places for metrics whose packages are installed: TensorBoard's files, by tensorboardX.

    Args:
      workdir: of the run; the files are in `tensorboard` there.
      step: updates done.
    """
    if not is_leader() or importlib.util.find_spec("tensorboardX") is None:
        return []
    from dalle_jax.train.tensorboard import TensorBoard

    try:
        return [TensorBoard(workdir / "tensorboard", step=step)]
    except OSError as error:
        log.warning("no metrics for TensorBoard in %s: %s", workdir, error.strerror)
        return []


class MetricsLog:
    """Appends to metrics.jsonl, one JSON object a line: step, stage, time_s and the metrics.

    Of several processes the first alone writes. A line that cannot be written, on a full disk, is
    written with the next one.

    `time_s` counts seconds of training from the start of the run and goes on after a resume.

    Args:
      path: the file; its lines beyond `step`, and broken ones, are dropped, so that a resumed run
        writes no line twice.
      stage: written on every line.
      step: updates done when the log is opened.
      sinks: other places for the same metrics.
    """

    def __init__(self, path: Path, *, stage: str, step: int, sinks: Sequence[MetricsSink] = ()):
        self._path = path
        self._stage = stage
        self._sinks = list(sinks)
        self._waiting = ""  # lines that could not be written yet
        earlier = [entry for entry in read_metrics(path) if entry["step"] <= step]
        self._start = time.monotonic() - (earlier[-1]["time_s"] if earlier else 0.0)
        if path.exists() and is_leader():
            atomic.write(path, "".join(json.dumps(entry) + "\n" for entry in earlier))
        self._end = path.stat().st_size if path.exists() else 0  # bytes of whole lines

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line; a value that is not finite becomes null, as JSON has no name for it."""
        if not is_leader():
            return
        for sink in list(self._sinks):
            try:
                sink.write(step, metrics)
            except OSError as error:
                self._sinks.remove(sink)
                log.warning("%s takes no more metrics (%s)", type(sink).__name__, error.strerror)
        entry = {
            "step": step,
            "stage": self._stage,
            "time_s": round(time.monotonic() - self._start, 2),
        }
        entry |= {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        failed_before = bool(self._waiting)
        self._waiting += json.dumps(entry, allow_nan=False) + "\n"
        try:
            with self._path.open("a") as file:
                file.write(self._waiting)
        except OSError as error:
            if not failed_before:
                log.warning("%s cannot be written (%s); its lines wait", self._path, error.strerror)
            with suppress(OSError):
                os.truncate(self._path, self._end)  # no half line stays before the next
        else:
            self._end += len(self._waiting.encode())
            self._waiting = ""
            if failed_before:
                log.info("%s is written again, nothing is missing", self._path)


def read_metrics(path: str | Path) -> list[dict]:
    """Reads the whole lines of a metrics.jsonl; a line cut short by a killed run is left out."""
    path = Path(path)
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class ProgressLog:
    """A progress bar on a terminal, and a plain line per report elsewhere. A context manager.

    Args:
      stage: name shown.
      step: updates done already.
      steps: updates in all.
    """

    def __init__(self, stage: str, *, step: int, steps: int):
        self._stage = stage
        self._steps = steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(stage, total=steps, completed=step, note="")

    def __enter__(self) -> "ProgressLog":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the loss of a window, and its rates if there are any (MetricsLog's names)."""
        note = f"loss {metrics['loss']:.4g}"
        if rate := metrics.get("steps_per_s"):
            note += f"  {rate:.3g} steps/s  {metrics['examples_per_s']:.3g} examples/s"
        if console.is_terminal:
            self._bar.update(self._task, completed=step, note=note)
            return
        if rate:
            note += f"  {clock((self._steps - step) / rate)} left"
        self.say(step, note)

    def say(self, step: int, text: str) -> None:
        """Writes a line that stays, such as a measurement."""
        say(f"{self._stage} {step}/{self._steps}  {text}")


def clock(seconds: float) -> str:
    """Writes a duration as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
