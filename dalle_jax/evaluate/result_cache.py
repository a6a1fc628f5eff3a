"""A cache of results on disk: sampled images and features, which take long to compute.

An evaluation that was stopped reads what it computed before. A result is found by a digest of
everything that it depends on, so another model, seed or option computes its own.
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

FORMAT = 1  # raise it when equal keys get other results

Arrays = dict[str, np.ndarray]


class ResultCache:
    """A folder of npz files.

    Args:
      folder: created with the first result; None to cache nothing.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self._folder = None if folder is None else Path(folder)

    def get(self, key: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Reads a result, or computes and writes it.

        Args:
          key: everything that the result depends on, as JSON can hold it.
          compute: returns named arrays.
        """
        if self._folder is None:
            return compute()
        path = self._folder / f"{digest(key)}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, zipfile.BadZipFile):  # damaged: compute it again
            path.unlink()
        arrays = compute()
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic.replaced(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return arrays


def temporary_array(*shape: int) -> np.ndarray:
    """A float32 array in a temporary file, which the system removes with it.

    Only the parts in use are in memory, unless TMPDIR is in memory too.
    """
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def digest(key: Any) -> str:
    """A name for a key: 32 hexadecimal digits."""
    text = json.dumps([FORMAT, key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
