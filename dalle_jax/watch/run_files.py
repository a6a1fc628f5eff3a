"""What a workdir says of its run: stages, curves, sheets.

Source: ours.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle_jax.errors import UserError
from dalle_jax.train.checkpoint_folder import steps as saved_steps
from dalle_jax.train.log import read_metrics

METRICS = "metrics.jsonl"
ORDER = ("dvae", "vqgan", "prior", "progressive", "clip")
POINTS = 600  # of a curve at most; more would not be seen
HELD_OUT = "eval/"
_LEFT_OUT = re.compile("step$|stage$|time_s$|last/")
_SHEET = re.compile(r"-(\d+)\.png$")


def read_run(workdir: Path) -> dict[str, Any]:
    """Reads the stages of a run, those that have begun.

    Args:
      workdir: of the run, or of one stage.
    Returns:
      A JSON-able dict with "name" and "stages"; of each stage "name", "folder" (below the workdir),
      "step", "steps" (in all, or None), "time_s", "left_s" (or None), "written" (seconds since
      1970), "curves" and "sheets". A curve is a dict with "name", and "train" and "held_out", lists
      of [step, value]; a sheet one with "step" and "path", below the workdir.
    Raises:
      UserError: if it is no folder, or no stage has begun there.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    files = [path for path in (workdir / METRICS, *workdir.glob(f"*/{METRICS}")) if path.is_file()]
    stages = [_stage(path, workdir) for path in files]
    stages = sorted((stage for stage in stages if stage), key=_place)
    if not stages:
        raise UserError(
            f"nothing in {workdir} has begun to train yet ({METRICS} comes after the first "
            "updates); give the --workdir of a run, or wait"
        )
    return {"name": workdir.resolve().name, "stages": stages}


def _place(stage: dict[str, Any]) -> tuple[int, str]:
    name = stage["name"]
    return ORDER.index(name) if name in ORDER else len(ORDER), stage["folder"]


def _stage(path: Path, workdir: Path) -> dict[str, Any] | None:
    entries = read_metrics(path)
    if not entries:
        return None
    last, folder = entries[-1], path.parent
    steps = _steps(folder, last.get("stage", ""))
    rate = next((e["steps_per_s"] for e in reversed(entries) if e.get("steps_per_s")), None)
    left = None if steps is None or rate is None else max(0.0, (steps - last["step"]) / rate)
    return {
        "name": last.get("stage", folder.name),
        "folder": folder.relative_to(workdir).as_posix(),
        "step": last["step"],
        "steps": steps,
        "time_s": last["time_s"],
        "left_s": left,
        "written": path.stat().st_mtime,
        "curves": _curves(entries),
        "sheets": list(_sheets(folder, workdir)),
    }


def _steps(folder: Path, stage: str) -> int | None:
    """How many there will be: by the newest checkpoint, before it by the plan."""
    checkpoints = folder / "checkpoints"
    newest = max(saved_steps(checkpoints), default=0)
    try:
        return json.loads((checkpoints / f"{newest:06d}" / "settings.json").read_text())["loop"][
            "steps"
        ]
    except (OSError, ValueError, KeyError):
        pass
    try:
        return json.loads((folder.parent / "plan.json").read_text())["steps"][stage]
    except (OSError, ValueError, KeyError):
        return None


def _curves(entries: list[dict]) -> list[dict[str, Any]]:
    """Loss first, then what is measured on held-out images too, then the others."""
    names = {name for entry in entries for name in entry if not _LEFT_OUT.match(name)}
    plain = sorted({name.removeprefix(HELD_OUT) for name in names})
    curves = [
        {
            "name": name,
            "train": _points(entries, name),
            "held_out": _points(entries, HELD_OUT + name),
        }
        for name in plain
    ]
    return sorted(curves, key=lambda curve: (curve["name"] != "loss", not curve["held_out"]))


def _points(entries: list[dict], name: str) -> list[list[int | float]]:
    points = [[e["step"], e[name]] for e in entries if e.get(name) is not None]
    stride = -(-len(points) // POINTS) or 1
    return points[::-1][::stride][::-1]  # the newest is always there


def _sheets(folder: Path, workdir: Path) -> Iterator[dict[str, Any]]:
    found = ((path, _SHEET.search(path.name)) for path in (folder / "sheets").glob("*.png"))
    for path, number in sorted(found, key=lambda pair: pair[0].name):
        if number:
            yield {"step": int(number[1]), "path": path.relative_to(workdir).as_posix()}
