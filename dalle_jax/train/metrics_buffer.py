"""Metrics between two log lines: read a few steps late, checked, averaged, timed.

Source: ours.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from dalle_jax.errors import UserError
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.stage import Metrics

# Steps that the host may run ahead of the device: enough to keep it busy, few enough that batches
# do not pile up in memory and that a signal is answered soon.
_IN_FLIGHT = 2


class NonFiniteError(UserError):
    """A metric became nan or infinite; no checkpoint was written from that step on."""


class MetricsBuffer:
    """The metrics of the steps since the last log line.

    Args:
      checkpoints: of the run, named in the error when a metric is not finite.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._unread: deque[tuple[int, dict, int, Any]] = deque()
        self.signal = 0
        """Of the newest step read: the signal that some process has caught, or 0."""
        self._metrics: list[dict[str, float]] = []
        self._steps = self._examples = 0  # since self._start
        self._start: float | None = None  # None until the first step, which compiles, is over

    def add(self, step: int, metrics: Metrics, *, examples: int, signal: Any = None) -> None:
        """Adds the metrics of a step as the device returns them, perhaps not computed yet.

        Args:
          step: steps done.
          metrics: f32 scalars.
          examples: in the batch, over all processes.
          signal: the greatest signal that any process has caught; None if there is one process.
        """
        self._unread.append((step, metrics, examples, signal))
        if len(self._unread) > _IN_FLIGHT:
            self._read()

    def read_all(self) -> None:
        """Waits for all metrics added so far, so that those not finite are found."""
        while self._unread:
            self._read()

    def _read(self) -> None:
        step, metrics, examples, signal = self._unread.popleft()
        self.signal = 0 if signal is None else int(signal)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if bad := sorted(k for k, x in values.items() if not math.isfinite(x)):
            raise NonFiniteError(_explain(step, values, bad, self._checkpoints))
        self._metrics.append(values)
        if self._start is None:
            self._start = time.monotonic()
        else:
            self._steps += 1
            self._examples += examples

    def summarize(self) -> dict[str, float]:
        """Gives mean and last value of each metric and the rates, and empties the buffer."""
        self.read_all()
        last = self._metrics[-1]
        values = {k: math.fsum(m[k] for m in self._metrics) / len(self._metrics) for k in last}
        values |= {f"last/{k}": x for k, x in last.items()}
        now = time.monotonic()
        if self._steps:
            elapsed = max(now - self._start, 1e-9)
            values["steps_per_s"] = self._steps / elapsed
            values["examples_per_s"] = self._examples / elapsed
        self._metrics, self._steps, self._examples, self._start = [], 0, 0, now
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside in the rates."""
        start = time.monotonic()
        yield
        if self._start is not None:
            self._start += time.monotonic() - start


def _explain(step: int, values: dict, bad: list[str], checkpoints: Checkpoints) -> str:
    name = "loss" if "loss" in bad else bad[0]
    others = f" (and {', '.join(k for k in bad if k != name)})" if len(bad) > 1 else ""
    saved = checkpoints.newest()
    good = (
        "no checkpoint was saved before"
        if saved is None
        else f"the last good checkpoint is step {saved} in {checkpoints.folder}"
    )
    return (
        f"{name}{others} became {values[name]} at step {step}; {good}; "
        "give another --seed to meet other batches from there, or lower the learning rate in a new "
        "folder, or look for broken values in the data"
    )
