"""The steps in a folder of checkpoints, and what is wrong with one.

Source: ours.
"""

import logging
import os
import re
from pathlib import Path

import jax

from dalle_jax.errors import UserError
from dalle_jax.parallel.processes import choose_on_leader, processes_where
from dalle_jax.train import manifest

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be used or written; the message says why and what to do."""


def steps(folder: Path) -> list[int]:
    """The steps on disk in rising order, damaged ones too, unfinished ones not."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def newest_undamaged(folder: Path) -> int | None:
    """The newest undamaged step, or None if there is no step; each process checks its own files.

    Raises:
      CheckpointError: if there are steps, but all are damaged.
    """
    damaged: list[int] = []
    while True:
        left = [step for step in steps(folder) if step not in damaged]
        newest = choose_on_leader(lambda left=left: max(left, default=None))
        if newest is None:
            break
        process = (jax.process_index(), jax.process_count())
        reason = manifest.damage(folder / f"{newest:06d}", newest, *process)
        others = processes_where(reason is not None)
        if not others:
            return newest
        reason = reason or f"process {others[0]} has found damage, which its log names"
        log.warning("checkpoint of step %d in %s is not used: %s", newest, folder, reason)
        damaged.append(newest)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(map(str, damaged))}; last "
            f"reason: {reason}); put back a good copy, or move the folder away to start over"
        )
    return None


def failure_reason(error: BaseException) -> str:
    """Why a save failed, in a few words; Orbax wraps those of the operating system."""
    if isinstance(error, CheckpointError):
        return str(error)
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno:
            return os.strerror(inner.errno)
        if code := re.search(r"os_error_code='(\d+)'", str(inner)):
            return os.strerror(int(code[1]))
        inner = inner.__cause__ or inner.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
