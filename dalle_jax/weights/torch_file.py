"""Reads files of `torch.save` without PyTorch, and without running what a pickle asks for.

A pickle may name any function and call it. Here only the few names that tensors are made of are
known; they make descriptions of tensors, which are looked up in the file's bytes afterwards. Both
containers are read: the zip archive (PyTorch 1.6 and later) and the older row of pickles.

    zip     NAME/data.pkl, then one stored file NAME/data/KEY for the values of each storage
    older   pickles: magic number, version, byte order, the object, the keys of its storages; then
            for each key int64 numel and the values
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dalle_jax.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class WeightsError(UserError):
    """A file of weights that cannot be used, said in one sentence."""


class _Storage(NamedTuple):
    """Values that tensors share: their key in the file, type and number."""

    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a dictionary of tensors, such as a state dict, that `torch.save` wrote.

    Args:
      path: the .pt, .pth or .bin file.
    Returns:
      The dictionary, with read-only numpy arrays in place of tensors. Dictionaries, lists and
      tuples may hold each other, plain numbers, text and None.
    Raises:
      WeightsError: if the file is damaged, or asks for anything besides tensors and plain values.
      OSError: if it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            read = _read_zip if zipfile.is_zipfile(file) else _read_older
            file.seek(0)
            found, values = read(file)
            if not isinstance(found, dict):
                raise WeightsError(f"it holds a {type(found).__name__}, not a dictionary")
            return _resolved(found, values)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None
        except OSError:
            raise
        except Exception as error:  # damaged bytes make the readers raise nearly anything
            raise WeightsError(
                f"{path} is damaged or not a file of torch.save ({error!r}); fetch it again"
            ) from error


def _read_zip(file: io.BufferedReader) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    heads = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(heads) != 1:
        raise WeightsError(f"it has {len(heads)} files */data.pkl, wanted 1")
    root = heads[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise WeightsError("it is a TorchScript program; save its state_dict() with torch.save")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise WeightsError("its numbers are big-endian; save it again on another machine")
    found = _Reader(io.BytesIO(archive.read(heads[0]))).load()

    def values(storage):
        return np.frombuffer(archive.read(f"{root}data/{storage.key}"), _DTYPES[storage.dtype])

    return found, values


def _read_older(file: io.BufferedReader) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    if _Reader(file).load() != _MAGIC:
        raise WeightsError("it does not start like a file of torch.save")
    _Reader(file).load()  # version of the protocol
    if not _Reader(file).load()["little_endian"]:
        raise WeightsError("its numbers are big-endian; save it again on another machine")
    reader = _Reader(file)
    found = reader.load()
    arrays = {}
    for key in _Reader(file).load():
        dtype = np.dtype(_DTYPES[reader.storages[key].dtype])
        (numel,) = np.frombuffer(file.read(8), "<i8")
        arrays[key] = np.frombuffer(file.read(int(numel) * dtype.itemsize), dtype)
    return found, lambda storage: arrays[storage.key]


class _Reader(pickle.Unpickler):
    """Unpickles descriptions of tensors; what they are made by does nothing else."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: _Tensor(
                storage, offset, tuple(shape), tuple(strides)
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise WeightsError(
            f"it asks for {module}.{name}, but only tensors are read; "
            "save the state_dict() alone with torch.save"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise WeightsError(f"it holds a {kind} of a kind that is not known here")
        storage = _Storage(key, dtype, numel)
        self.storages[key] = storage
        return storage


def _resolved(found: Any, values: Callable[[_Storage], np.ndarray]) -> Any:
    """Puts arrays in place of descriptions; a storage is read once."""
    arrays: dict[_Storage, np.ndarray] = {}

    def walk(node):
        if isinstance(node, _Tensor):
            if node.storage not in arrays:
                arrays[node.storage] = values(node.storage)
            return _view(node, arrays[node.storage])
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(walk(value) for value in node)
        return node

    return walk(found)


def _view(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    _, offset, shape, strides = tensor
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    inside = offset >= 0 and min(strides, default=0) >= 0 and last < values.size
    if values.size != tensor.storage.numel or (0 not in shape and not inside):
        raise WeightsError(f"a tensor of shape {list(shape)} does not fit its values; it is cut")
    if 0 in shape:
        return np.empty(shape, values.dtype)
    steps = [step * values.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
