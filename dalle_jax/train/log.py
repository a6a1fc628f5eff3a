"""What a run says: metrics.jsonl, a progress bar or plain lines, and log lines beside them.

Source: ours.
"""

import json
import logging
import math
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# One console for the bar and the log, so that a log line moves the bar down and not through it.
_console = Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


def _print(line: str) -> None:
    now = time.strftime("%H:%M:%S")
    _console.print(f"{now} {line}", markup=False, highlight=False, soft_wrap=True)


def show_log_lines() -> None:
    """Sends log lines of dalle_jax to the terminal; for programs, to be called once at the start.

    Does nothing if the logger "dalle_jax" has a handler already. Its lines no longer reach the
    root logger: importing Orbax gives that one a handler, which would print them again.
    """
    logger = logging.getLogger("dalle_jax")
    if not logger.handlers:
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class MetricsLog:
    """Appends to metrics.jsonl, one JSON object a line: step, stage, time_s and the metrics.

    `time_s` counts seconds of training from the start of the run and goes on after a resume.

    Args:
      path: the file; its lines beyond `step`, and broken ones, are dropped, so that a resumed run
        writes no line twice.
      stage: written on every line.
      step: updates done when the log is opened.
    """

    def __init__(self, path: Path, *, stage: str, step: int):
        self._path = path
        self._stage = stage
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
        self._start = time.monotonic() - (kept[-1]["time_s"] if kept else 0.0)
        if path.exists():
            shortened = path.with_suffix(".tmp")
            shortened.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            os.replace(shortened, path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line; a value that is not finite becomes null, as JSON has no name for it."""
        entry = {
            "step": step,
            "stage": self._stage,
            "time_s": round(time.monotonic() - self._start, 2),
        }
        entry |= {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


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
            console=_console,
            disable=not _console.is_terminal,
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
        if _console.is_terminal:
            self._bar.update(self._task, completed=step, note=note)
            return
        if rate:
            note += f"  {clock((self._steps - step) / rate)} left"
        self.say(step, note)

    def say(self, step: int, text: str) -> None:
        """Writes a line that stays, such as a measurement."""
        _print(f"{self._stage} {step}/{self._steps}  {text}")


def clock(seconds: float) -> str:
    """Writes a duration as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
