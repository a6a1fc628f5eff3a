"""Processes that train together: how they find each other, and what one does for all.

Starting, watching and restarting them is the work of Slurm, Kubernetes or whatever runs the
machines; docs/training.md has a script for each.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from dalle_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Where this process stands among those that train together.

    Found without help on Slurm, with Open MPI, on TPU pods, and on Kubernetes if the package
    kubernetes is installed.
    """

    coordinator_address: str | None = None
    """Address and port of process 0, as 10.0.0.1:1234; None to look around, or to be alone."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""

    def __post_init__(self):
        given = [
            value is not None
            for value in (self.coordinator_address, self.num_processes, self.process_id)
        ]
        if any(given) and not all(given):
            raise UserError(
                f"coordinator_address is {self.coordinator_address}, num_processes "
                f"{self.num_processes} and process_id {self.process_id}; give all three, or none "
                "to look around"
            )
        if all(given) and not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"process_id is {self.process_id}, but must lie in 0..{self.num_processes - 1}"
            )


def join(config: ProcessConfig) -> None:
    """Waits for all processes and makes their devices one; before anything else asks for devices.

    A process alone goes on as it is. When one of them dies, the runtime ends the others.
    """
    if config.coordinator_address is not None:
        jax.distributed.initialize(
            config.coordinator_address, config.num_processes, config.process_id
        )
    elif is_distributed():
        jax.distributed.initialize()


def is_distributed() -> bool:
    """Tells whether something started several processes that JAX knows how to bring together."""
    several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, "1")) > 1 for name in several):
        return True
    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return (indexed and _installed("kubernetes")) or _installed("libtpu")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_leader() -> bool:
    """Whether this process writes what is written once for all."""
    return jax.process_index() == 0


def choose_on_leader(choose: Callable[[], int | None]) -> int | None:
    """What process 0 chooses, a number from 0 on or None, in all processes.

    Raises:
      RuntimeError: in the others, if it failed in process 0, which raises what went wrong.
    """
    if jax.process_count() == 1:
        return choose()
    failed, nothing = -2, -1
    answer = np.int64(failed)
    try:
        if is_leader():
            choice = choose()
            answer = np.int64(nothing if choice is None else choice)
    finally:
        answer = int(multihost_utils.broadcast_one_to_all(answer))
    if answer == failed:
        raise RuntimeError("process 0 cannot go on; its log says why")
    return None if answer == nothing else answer


def processes_where(true: bool) -> list[int]:
    """The processes that give True; all of them have to call it."""
    if jax.process_count() == 1:
        return [0] if true else []
    return np.flatnonzero(multihost_utils.process_allgather(np.int64(true))).tolist()


@contextmanager
def leader_first(what: str) -> Iterator[None]:
    """Runs its body in process 0, and then in the others: to write files once, then read them.

    Args:
      what: a name for this place, the same in all processes.
    """
    if jax.process_count() == 1:
        yield
        return
    if not is_leader():
        multihost_utils.sync_global_devices(what)
    yield
    if is_leader():
        multihost_utils.sync_global_devices(what)
