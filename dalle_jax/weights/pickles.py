"""Reads pickles of tensors as data: what a pickle asks to be called is never called.

A pickle is a program for a small machine, which may name any function and call it. Its instructions
are looked through before it is run, so that it cannot take memory beyond its own length, and only
the few names that tensors are made of have a meaning. Other names are refused, or stand for empty
shells that hold what the pickle gives them and do nothing.
"""

import collections
import io
import mmap
import pickle
import pickletools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dalle_jax.weights.errors import WeightsError

DTYPES = {
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

# What `torch.save` and TorchScript write. Others, such as BYTEARRAY8, take memory that they name.
_INSTRUCTIONS = frozenset(
    """PROTO MARK STOP EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT
    LONG_BINPUT BINGET LONG_BINGET BINUNICODE SHORT_BINSTRING BINSTRING BININT BININT1 BININT2 LONG1
    BINFLOAT NEWTRUE NEWFALSE NONE GLOBAL REDUCE BUILD NEWOBJ BINPERSID SETITEM SETITEMS APPEND
    APPENDS""".split()  # noqa: SIM905
)


class Storage(NamedTuple):
    """Values that tensors share: their key in the file, type and number."""

    key: str
    dtype: str
    numel: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Shell:
    """Stands for an object of any other class: keeps its state, and nothing else."""

    state: Any = None
    of = "object"
    """Module and name of the class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Shell":
        """Takes any arguments and leaves them."""
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Leaves the value."""

    def extend(self, values: Any) -> None:
        """Leaves the values."""


class Reader(pickle.Unpickler):
    """Unpickles descriptions of tensors, from where a file stands.

    Args:
      file: with the pickle, in memory or mapped, so that reading takes no more than there is;
        afterwards it stands behind it.
      shells: whether unknown names become empty shells; else they are refused.
    """

    def __init__(self, file: io.BytesIO | mmap.mmap, *, shells: bool = False):
        super().__init__(io.BytesIO(_checked(file)), encoding="utf-8")
        self._shells = shells
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Gives what stands for a name."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: Tensor(
                storage, offset, tuple(shape), tuple(strides)
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in DTYPES:
            return name
        if not self._shells:
            raise WeightsError(
                f"it asks for {module}.{name}, but only tensors are read; "
                "save the state_dict() alone with torch.save"
            )
        if module == "torch.jit._pickle":  # restore_type_tag and the like: lists with their types
            return lambda content, *rest: content
        return type("Shell", (Shell,), {"of": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Describes a storage; a class of a module, which older files name with its code."""
        if pid[0] == "module":
            return pid[1]
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or any(part is not None for part in view) or dtype not in DTYPES:
            raise WeightsError(f"it holds a {kind} of a kind that is not known here")
        storage = Storage(str(key), dtype, int(numel))
        self.storages[storage.key] = storage
        return storage


def _checked(file: io.BytesIO | mmap.mmap) -> bytes:
    """The bytes of one pickle, of which every instruction is known and no number too large."""
    start = file.tell()
    largest = 0
    for instruction, value, at in pickletools.genops(file):
        if instruction.name not in _INSTRUCTIONS:
            raise WeightsError(f"its pickle has the instruction {instruction.name} at byte {at}")
        if instruction.name in ("BINPUT", "LONG_BINPUT"):
            largest = max(largest, value)
    length = file.tell() - start
    if largest > length:  # Python makes room for as many objects at once
        raise WeightsError(f"its pickle of {length} bytes numbers an object {largest}")
    file.seek(start)
    return file.read(length)
