"""Reads the msgpack files of flax as data: nested dictionaries of arrays, by whole names.

flax writes an array as an extension of msgpack that holds its shape, the name of its dtype and its
bytes, and one above 1 GiB as a dictionary of its pieces. The file is mapped, and arrays are views
of it, so that one takes no memory before it is used; flax's own reader would copy them all, and
take the lengths in a damaged file at their word.
"""

import math
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle_jax.weights.errors import WeightsError

_ARRAY, _SCALAR = 1, 3  # extensions of flax
_PIECES = "__msgpack_chunked_array__"
_MOST_PARTS = 2**20  # names, numbers and arrays of an honest file; mega has about 1,000
_MOST_LEVELS = 64
_DTYPES = {
    name: np.dtype(name)
    for name in (
        "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
        "uint16", "uint8", "bool",
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip


def read_msgpack(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the parameters that `flax.serialization` wrote.

    Args:
      path: the .msgpack file.
    Returns:
      Read-only arrays by their names, joined with "/". Those that were written whole are views of
      the mapped file.
    Raises:
      WeightsError: if the file is damaged, or holds anything but arrays.
      OSError: if it cannot be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise WeightsError("it is empty")
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        reader = _Reader(content)
        found = reader.value()
        if reader.at != len(content):
            raise WeightsError(f"{len(content) - reader.at} bytes follow its end")
        if not isinstance(found, dict):
            raise WeightsError(f"it holds a {type(found).__name__}, not a dictionary")
        return _flat(found)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # sizes that numpy cannot make, names that are no text
        raise WeightsError(
            f"{path} is damaged or not a msgpack file of flax ({error!r:.200}); fetch it again"
        ) from error


class _Reader:
    """The values of a file, one after another."""

    def __init__(self, content: np.ndarray):
        self.content, self.at, self.parts, self.level = content, 0, 0, 0

    def value(self) -> Any:
        """The next value, with all that it holds."""
        self.parts += 1
        if self.parts > _MOST_PARTS:
            raise WeightsError(f"it holds more than {_MOST_PARTS} values; it is no honest one")
        kind = self.number(1)
        if kind < 0x80:
            return kind
        if kind < 0x90:
            return self.held(dict, kind & 0x0F)
        if kind < 0xA0:
            return self.held(list, kind & 0x0F)
        if kind < 0xC0:
            return self.text(kind & 0x1F)
        match kind:
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return kind == 0xC3
            case 0xC4 | 0xC5 | 0xC6:
                return self.bytes(self.number(1 << kind - 0xC4))
            case 0xC7 | 0xC8 | 0xC9:
                return self.extension(self.number(1 << kind - 0xC7))
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return self.number(1 << kind - 0xCC)
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self.extension(1 << kind - 0xD4)
            case 0xD9 | 0xDA | 0xDB:
                return self.text(self.number(1 << kind - 0xD9))
            case 0xDC | 0xDD:
                return self.held(list, self.number(2 << kind - 0xDC))
            case 0xDE | 0xDF:
                return self.held(dict, self.number(2 << kind - 0xDE))
        raise WeightsError(f"it has a value of type {kind:#x}, which parameters do not need")

    def bytes(self, length: int) -> np.ndarray:
        """The next bytes, where they lie."""
        start, self.at = self.at, self.at + length
        if self.at > len(self.content):
            raise WeightsError("it ends before its values do; it is cut")
        return self.content[start : self.at]

    def number(self, length: int) -> int:
        """The next number of that many bytes."""
        return int.from_bytes(self.bytes(length).tobytes(), "big")

    def text(self, length: int) -> str:
        """The next text."""
        return self.bytes(length).tobytes().decode()

    def held(self, kind: type, length: int) -> Any:
        """A list, or a dictionary with text as keys; memory grows with what is read alone."""
        self.level += 1
        if self.level > _MOST_LEVELS:
            raise WeightsError(f"its values are nested more than {_MOST_LEVELS} times")
        new: Any = kind()
        for _ in range(length):
            if kind is list:
                new.append(self.value())
                continue
            key = self.value()
            if not isinstance(key, str) or key in new:
                raise WeightsError(f"its name {str(key)[:80]!r} is no text or stands there twice")
            new[key] = self.value()
        self.level -= 1
        return new

    def extension(self, length: int) -> np.ndarray:
        """The next array."""
        code, end = self.number(1), self.at + length
        if code not in (_ARRAY, _SCALAR):
            raise WeightsError(f"it has a value of extension {code}, which flax does not write")
        shape, dtype, values = self.value()
        if self.at != end:
            raise WeightsError("an array is not as long as it says")
        name = dtype if isinstance(dtype, str) else dtype.tobytes().decode()
        if name not in _DTYPES:
            raise WeightsError(f"it has an array of {name[:80]!r}, wanted one of {list(_DTYPES)}")
        return values.view(_DTYPES[name]).reshape(_sizes(shape))


def _sizes(shape: Any) -> tuple[int, ...]:
    if not all(type(size) is int for size in shape):
        raise WeightsError("an array has a size that is no whole number")
    return tuple(shape)


def _flat(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by whole names; pieces are joined."""
    arrays: dict[str, np.ndarray] = {}
    waiting = [("", found)]
    while waiting:
        prefix, part = waiting.pop()
        for key, value in part.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and _PIECES in value:
                value = _joined(value)
            if isinstance(value, dict):
                waiting.append((f"{name}/", value))
            elif isinstance(value, np.ndarray) and name not in arrays:
                arrays[name] = value
            else:
                raise WeightsError(f"its {name[:80]!r} is no array or stands there twice")
    return arrays


def _joined(pieces: dict[str, Any]) -> np.ndarray:
    """The array that was written in pieces."""
    shape = _sizes([pieces["shape"][str(axis)] for axis in range(len(pieces["shape"]))])
    parts = [pieces["chunks"][str(i)] for i in range(len(pieces["chunks"]))]
    if len({part.dtype for part in parts}) != 1 or sum(p.size for p in parts) != math.prod(shape):
        raise WeightsError("an array's pieces do not make it up")
    return np.concatenate(parts).reshape(shape)
