"""Writes files that `torch.load` opens, without PyTorch.

The zip archive of PyTorch 1.6 and later; `weights.torch_file` says what stands in it.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import atomic
from dalle_jax.weights.pickles import DTYPES

_STORAGES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_START, _STOP = b"\x80\x02", b"."
_ALIGNED = 64  # bytes, where values begin


def write_torch(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes dictionaries of arrays, numbers and text; the file appears when it is complete.

    Args:
      path: of the new file.
      tree: arrays become tensors; dictionaries may hold each other.
    """
    path = Path(path)
    arrays: list[np.ndarray] = []
    pickled = _START + _pickled(tree, arrays) + _STOP
    with (
        atomic.replaced(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
    ):  # not compressed
        root = path.name.split(".")[0] or "archive"
        _add(archive, f"{root}/data.pkl", pickled)
        _add(archive, f"{root}/byteorder", b"little")
        for key, array in enumerate(arrays):
            _add(archive, f"{root}/data/{key}", array.reshape(-1).view(np.uint8))
        _add(archive, f"{root}/version", b"3\n")


def _add(archive, name, content):
    info = zipfile.ZipInfo(name)  # of 1980, so that equal weights give equal files
    head = archive.fp.tell() + 30 + len(name.encode())
    room = -(head + 4) % _ALIGNED
    info.extra = b"FB" + room.to_bytes(2, "little") + b"Z" * room
    archive.writestr(info, bytes(content))


def _pickled(node: Any, arrays: list[np.ndarray]) -> bytes:
    if isinstance(node, Mapping):
        parts = (_pickled(key, arrays) + _pickled(value, arrays) for key, value in node.items())
        return b"}(" + b"".join(parts) + b"u"
    if isinstance(node, str):
        text = node.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    if isinstance(node, bool):
        return b"\x88" if node else b"\x89"
    if isinstance(node, int):
        return b"\x8a\x08" + node.to_bytes(8, "little", signed=True)
    array = np.ascontiguousarray(node).reshape(np.shape(node))
    strides = [step // array.itemsize for step in array.strides]
    arrays.append(array)
    storage = _STORAGES[array.dtype]
    key = str(len(arrays) - 1)
    return described_tensor(key, storage, array.size, 0, array.shape, strides)


def described_tensor(
    key: str, storage: str, numel: int, offset: int, shape: Sequence, strides: Sequence
) -> bytes:
    """Instructions of a pickle that make a tensor.

    Args:
      key: of its values in the archive.
      storage: their type, as in `pickles.DTYPES`.
      numel: their number.
      offset: where the tensor begins among them.
      shape: of the tensor.
      strides: of the tensor, counted in values.
    """

    def plain(value):
        if isinstance(value, tuple | list):
            return b"(" + b"".join(map(plain, value)) + b"t"
        return value if isinstance(value, bytes) else _pickled(value, [])

    kind = b"ctorch\n" + storage.encode() + b"\n"
    persistent = plain(("storage", kind, key, "cpu", numel)) + b"Q"
    hooks = b"ccollections\nOrderedDict\n)R"
    made_of = (persistent, offset, tuple(shape), tuple(strides), False, hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + plain(made_of) + b"R"
