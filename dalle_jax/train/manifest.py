"""The manifests of a saved step: size and sha256 of each of its files.

Orbax notices a truncated file, but reads back a flipped byte without complaint.

Of several processes each hashes the files that it wrote: `manifest.json` lists those of process 0
and, with their hashes too, `manifest-00001.json` and so on, which list those of the others.

Source: ours.
"""

import hashlib
import json
import re
from pathlib import Path

from dalle_jax import atomic

_NAME = "manifest.json"
_PART = re.compile(r"manifest-\d+\.json")
_WRITER = re.compile(r"ocdbt\.process_(\d+)")  # Orbax's folder of what one process wrote


def name(index: int) -> str:
    """File name of the manifest that a process writes."""
    return f"manifest-{index:05d}.json" if index else _NAME


def write(folder: Path, step: int, index: int = 0, count: int = 1) -> None:
    """Writes this process's manifest of a finished step into its folder.

    Args:
      folder: holds every file of the step; for process 0 the manifests of all others too.
      step: number of the step, so that a folder renamed by hand is noticed.
      index: which process this is.
      count: how many there are.
    """
    paths = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    files = {
        path: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for path, file in sorted(paths.items())
        if _writer(path) % count == index and path != _NAME and file.is_file()
    }
    atomic.write(folder / name(index), json.dumps({"step": step, "files": files}, indent=1))


def _writer(path: str) -> int:
    found = _WRITER.search(path)
    return int(found[1]) if found else 0


def damage(folder: Path, step: int, index: int = 0, count: int = 1) -> str | None:
    """Compares files of a step with their manifests.

    Args:
      folder: of the step.
      step: number that the folder's name claims.
      index: which process this is; each compares its share of the manifests.
      count: how many there are.
    Returns:
      The first difference, naming the file; None if there is none.
    """
    try:
        return _difference(folder, step, index, count)
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_NAME} is unreadable"


def _difference(folder: Path, step: int, index: int, count: int) -> str | None:
    parts = [_NAME, *(path for path in _read(folder, _NAME)["files"] if _PART.fullmatch(path))]
    for part in parts[index::count]:
        if not (folder / part).is_file():
            return f"{part} is missing"
        manifest = _read(folder, part)
        if manifest["step"] != step:
            return f"it was saved as step {manifest['step']}"
        for path, entry in manifest["files"].items():
            file, size = folder / path, entry["size"]
            if not file.is_file():
                return f"{path} is missing"
            if file.stat().st_size != size:
                return f"{path} has {file.stat().st_size} bytes instead of {size}"
            if _sha256(file) != entry["sha256"]:
                return f"{path} has changed since it was written"
    return None


def _read(folder: Path, part: str) -> dict:
    return json.loads((folder / part).read_text())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
