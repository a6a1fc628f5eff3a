"""Results on disk, filed by the question they answer.

What takes long (drawn pictures, features) is kept in small parts. An evaluation that was stopped
finds its parts again; one that asks for something else asks other questions, and finds none.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import atomic

FORMAT = 1  # to be raised when the same question gets another answer

Arrays = dict[str, np.ndarray]


class Kept:
    """A folder of answers.

    Args:
      folder: made when the first answer comes; None to keep nothing.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._folder = None if folder is None else Path(folder)

    def arrays(self, question: dict[str, Any], answer: Callable[[], Arrays]) -> Arrays:
        """Reads the answer to a question, or finds it and keeps it.

        Args:
          question: everything that the answer depends on; goes into JSON.
          answer: gives named arrays.
        """
        if self._folder is None:
            return answer()
        path = self._folder / f"{digest(question)}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, zipfile.BadZipFile):  # damaged: it is found again
            path.unlink()
        found = answer()
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic.replaced(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **found)
        return found


def on_disk(*shape: int) -> np.ndarray:
    """Makes an array of float32 that lies in a temporary file, which the system removes with it.

    Only the parts in use are in memory, unless TMPDIR lies there too.
    """
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def digest(question: Any) -> str:
    """A name for a question: 32 hexadecimal digits."""
    text = json.dumps([FORMAT, question], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
