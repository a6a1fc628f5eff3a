"""What the benchmarks share: their options, the clock, the machine's peaks, peers and printing.

A share of a peak means little without the peak of the same minute, so the machine is measured
anew before each case that states one.
"""

import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.malloc import reuse_freed_memory

THREADS = os.cpu_count()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark can be asked for."""

    json: bool = False
    """Print one JSON object a line instead of a table."""
    quick: bool = False
    """Run the smaller cases alone, in less than a minute."""
    only: str = ""
    """Run only the cases whose name begins with this."""

    def wanted(self, case: str, quick: Container[str]) -> bool:
        """Tells whether a case is to be run, given the names of the quick ones."""
        return case.startswith(self.only) and (case in quick or not self.quick)


@dataclass(frozen=True, kw_only=True)
class PeerOptions(Options):
    """Options of the benchmarks that a public peer can be run beside."""

    peer: tuple[Path, Path] | None = None
    """Python that has the peers installed, and the folder of the harness bench_peers.py."""


class Report:
    """Prints measurements as they come; to be made first, since it has freed memory kept.

    Args:
      bench: name of the script.
      as_json: print JSON lines, not a table.
    """

    def __init__(self, bench: str, *, as_json: bool):
        reuse_freed_memory()
        self._bench, self._as_json = bench, as_json
        if not as_json:
            print(f"{'case':<34}{'metric':<32}{'value':>10} {'unit':<16}target", flush=True)
        self._looked = _others_seconds(), time.monotonic()
        self.look()

    def look(self) -> None:
        """Measures the machine again, and says what others have used of it since the last time."""
        self.machine = machine()
        if self._as_json:
            return
        before, start = self._looked
        self._looked = others, now = _others_seconds(), time.monotonic()
        share = (others - before) / (now - start) / THREADS
        peaks = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        print(f"# machine: {peaks}; others had {share:.0%} of it", flush=True)

    def add(
        self, case: str, metric: str, value: float, unit: str, target: float | None = None
    ) -> None:
        """Prints one measurement.

        Args:
          case: what was measured.
          metric: which of its properties.
          value: the number.
          unit: of the value and the target.
          target: what it should reach; None where there is none.
        """
        if self._as_json:
            line = {"bench": self._bench, "case": case, "metric": metric}
            line |= {"value": float(f"{value:.4g}"), "unit": unit, "target": target}
            print(json.dumps(line | {"machine": self.machine}), flush=True)
        else:
            wanted = "" if target is None else f"{target:g}"
            print(f"{case:<34}{metric:<32}{value:>10.4g} {unit:<16}{wanted}", flush=True)


def machine(size: int = 2048, megabytes: int = 256) -> dict[str, float]:
    """What jnp reaches at its best here, float32: a square product, and summing a long vector."""
    square = jnp.ones((size, size))
    product = min(times(jax.jit(jnp.matmul), square, square, seconds=0, least=15))
    vector = jnp.ones(megabytes * 2**18)
    read = min(times(jax.jit(jnp.sum), vector, seconds=0, least=15))
    return {
        "gemm_gflops": round(2e-9 * size**3 / product, 1),
        "read_gbs": round(1e-9 * vector.nbytes / read, 1),
    }


def _others_seconds() -> float:
    """Processor seconds that others have had since the start: processes here, and machines beside
    a virtual one ("steal"). 0 where Linux is not.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, _, _, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def own_read_gbs(megabytes: int = 256) -> float:
    """What the machine can read without jax, in GB/s: numpy's maximum, one run a thread."""
    parts = np.array_split(np.ones(megabytes * 2**18, np.float32), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        taken = min(times(lambda: list(pool.map(np.max, parts)), seconds=0, least=7))
    return 1e-9 * sum(part.nbytes for part in parts) / taken


def times(function: Callable, *args: Any, seconds: float = 4, least: int = 3) -> list[float]:
    """Seconds of each call, until all of them have taken `seconds`, and of at least `least` calls.

    One call before them, which touches its memory for the first time, is not counted.
    """
    jax.block_until_ready(function(*args))
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        taken.append(time.perf_counter() - start)
    return taken


def median_time(function: Callable, *args: Any, **how: Any) -> float:
    """The median of `times`."""
    return statistics.median(times(function, *args, **how))


def drawn(init: Callable, *inputs: Any) -> dict:
    """Small random weights, as `init` of a key and inputs would draw; numpy compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    shapes = shapes.get("params", shapes)  # of a Flax module

    def draw(leaf):
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, shapes)


@functools.cache
def peer_rates(peer: tuple[Path, Path], item: str, unit: str) -> dict[str, float]:
    """Runs the items of a peer's harness whose names begin with `item`: names to medians.

    Raises:
      RuntimeError: with the harness's words, if it measured nothing.
    """
    python, harness = peer
    command = [python, harness / "bench_peers.py", "--only", item, "--threads", str(THREADS)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    rates = {line["what"]: line["value"] for line in lines if line.get("unit") == unit}
    if not rates:
        raise RuntimeError(f"no {unit} of {item} from the peers: {done.stdout}{done.stderr}")
    return rates
