"""What the options of a command name: checked before any work, and saved whatever happens."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle_jax.errors import UserError

SEEDS = 2**32


def check_input(option: str, path: Path | None) -> None:
    """Raises a UserError if there is a path, but no file that can be read."""
    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{option} is {path}, which cannot be read: {error.strerror}") from error


def check_output(option: str, path: Path | None, suffix: str = "") -> None:
    """Checks that a file can be written; None stands for none.

    Args:
      option: as the user knows it.
      path: of the file, which may be there already.
      suffix: that its name must have, in small letters; "" for any.
    Raises:
      UserError: if it has another, or something is in the way.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        kind = suffix[1:].upper()
        raise UserError(f"{option} is {path}; it is a {kind}, so its name must end in {suffix}")
    _check_folder_of(option, path, path.parent)
    if path.is_dir():
        raise UserError(f"{option} is {path}, but that is a folder; name a file")


def check_output_folder(option: str, path: Path | None) -> None:
    """Raises a UserError if there is a path, but no files can be written to that folder."""
    if path is not None:
        _check_folder_of(option, path, path)


def check_room(option: str, path: Path, size: int) -> None:
    """Raises a UserError if the disk of a path has no room for so many bytes."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{option} is {path}, which will take {size / 1e9:.1f} GB, but its disk has "
            f"{free / 1e9:.1f} GB free; make room or choose another place"
        )


def _check_folder_of(option, path, folder):
    try:
        named = path.absolute()  # "." has no name
        named.with_name(f".{named.name}.partial").exists()  # which is how long its name gets
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} is {path}, where nothing can be written ({error.strerror}); choose another "
            "place"
        ) from error


def save_outputs(outputs: Sequence[tuple[Path, Callable[[Path], object]]]) -> None:
    """Saves what took long to make, each file or folder by a function of its path.

    What cannot be written goes to a temporary folder instead, and the rest is still saved.

    Raises:
      UserError: then; it says where everything is.
    """
    failed = []
    for path, save in outputs:
        try:
            save(path)
        except OSError as error:
            instead = Path(tempfile.mkdtemp(prefix="dalle-jax-")) / path.name
            save(instead)
            failed.append(f"{path} could not be written ({error.strerror}); it is {instead} now")
    if failed:
        raise UserError("; ".join(failed))


def check_seed(seed: int) -> None:
    """Raises a UserError for a seed that JAX or numpy would not take."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed is {seed}; it must be a whole number from 0 to {SEEDS - 1}")
