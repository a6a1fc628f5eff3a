"""The settings of a run that a checkpoint saves, and which of them may change on resume.

Source: ours.
"""

import dataclasses
from typing import Any

from dalle_jax.train import checkpoint_diff, loop

MAY_CHANGE = (
    *(f"loop.{name}" for name in loop.MAY_CHANGE),
    "run.remat",  # memory and time, but not what is computed
    "run.scan_layers",
    "run.micro_batch",
)
"""Settings that may differ between a checkpoint and the run that resumes from it."""


def settings(run: Any) -> dict:
    """What is saved with a checkpoint; all but `MAY_CHANGE` has to agree on resume."""
    return _run_and_loop(dataclasses.asdict(run))


def defaults(run: Any) -> dict:
    """The defaults of those settings, for a checkpoint that is older than some of them."""
    return _run_and_loop(checkpoint_diff.defaults(run))


def _run_and_loop(fields: dict) -> dict:
    loop = fields.pop("loop")
    return {"run": fields, "loop": loop}
