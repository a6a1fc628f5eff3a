"""The manifest of a saved step: size and sha256 of each of its files.

Orbax notices a truncated file, but reads back a flipped byte without complaint.

Source: ours.
"""

import hashlib
import json
from pathlib import Path

_NAME = "manifest.json"


def write(folder: Path, step: int) -> None:
    """Writes the manifest of a finished step into its folder.

    Args:
      folder: holds every file of the step, and no manifest yet.
      step: number of the step, so that a folder renamed by hand is noticed.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    content = {
        "step": step,
        "files": {
            file.relative_to(folder).as_posix(): {
                "size": file.stat().st_size,
                "sha256": _sha256(file),
            }
            for file in files
        },
    }
    (folder / _NAME).write_text(json.dumps(content, indent=1))


def damage(folder: Path, step: int) -> str | None:
    """Compares every file of a step with its manifest.

    Args:
      folder: of the step.
      step: number that the folder's name claims.
    Returns:
      The first difference, naming the file; None if there is none.
    """
    try:
        return _difference(folder, step)
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_NAME} is unreadable"


def _difference(folder: Path, step: int) -> str | None:
    manifest = json.loads((folder / _NAME).read_text())
    if manifest["step"] != step:
        return f"it was saved as step {manifest['step']}"
    for name, entry in manifest["files"].items():
        file, size = folder / name, entry["size"]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
