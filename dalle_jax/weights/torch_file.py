"""Reads files of `torch.save` and TorchScript without PyTorch, and without running what they ask.

Pickles become descriptions of tensors (`weights.pickles`), which are looked up in the file's bytes
afterwards. The file is mapped, so that a tensor takes no memory before it is used. Three containers
are read: the zip archive (PyTorch 1.6 and later), TorchScript's, and the older row of pickles.

    zip     NAME/data.pkl, then one stored file NAME/data/KEY for the values of each storage
    script  the same, with constants.pkl and the program's code, which is left alone
    older   pickles: magic number, version, byte order, the object, the keys of its storages; then
            for each key int64 numel and the values
"""

import io
import mmap
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.pickles import DTYPES, Reader, Shell, Storage, Tensor

_SMALLEST_ZIP = 22  # bytes
_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_TIMES = 4  # that all tensors together may be as large as the file: tied weights count twice
_LARGEST_PICKLE = 2**26  # bytes; a description of tensors, not their values

Values = Callable[[Storage], np.ndarray]


def read_torch(path: str | os.PathLike, *, shells: bool = False) -> dict[str, Any]:
    """Reads a dictionary of tensors, such as a state dict, that `torch.save` wrote.

    Args:
      path: the .pt, .pth, .ckpt, .pkl or .bin file.
      shells: whether objects of any class may stand in it, as in files of whole modules, of
        TorchScript and of Lightning. They are read as empty shells, whose code is never run.
    Returns:
      The dictionary, with read-only numpy arrays of the mapped file in place of tensors.
      Dictionaries, lists and tuples may hold each other, plain numbers, text and None. Of a module
      its parameters and buffers, by their names in its state dict.
    Raises:
      WeightsError: if the file is damaged, or asks for anything besides tensors and plain values.
      OSError: if it cannot be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise WeightsError("it is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(mapped, np.uint8)
        zipped = len(content) >= _SMALLEST_ZIP and zipfile.is_zipfile(mapped)
        read = _read_zip if zipped else _read_older
        mapped.seek(0)
        found, values = read(mapped, content, shells)
        found = _resolved(found, values, most=_MOST_TIMES * len(content))
        if isinstance(found, Shell):
            found = module_tensors(found)
        if not isinstance(found, dict):
            raise WeightsError(f"it holds a {type(found).__name__}, not a dictionary")
        return found
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise WeightsError(
            f"{path} is damaged or not a file of torch.save ({error!r:.200}); fetch it again"
        ) from error


def _read_zip(file: mmap.mmap, content: np.ndarray, shells: bool) -> tuple[Any, Values]:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    heads = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(heads) != 1:
        raise WeightsError(f"it has {len(heads)} files */data.pkl, wanted 1")
    root = heads[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members and not shells:
        raise WeightsError("it is a TorchScript program; save its state_dict() with torch.save")

    def stored(name):
        return _member(content, members[name])

    if f"{root}byteorder" in members and stored(f"{root}byteorder").tobytes() != b"little":
        raise WeightsError("its numbers are big-endian; save it again on another machine")
    head = stored(heads[0])
    if len(head) > _LARGEST_PICKLE:
        raise WeightsError(f"its pickle has {len(head)} bytes; at most {_LARGEST_PICKLE} are read")
    found = Reader(io.BytesIO(head.tobytes()), shells=shells).load()
    return found, lambda s: stored(f"{root}data/{s.key}").view(DTYPES[s.dtype])


def _member(content: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """Bytes of a file of the archive, where they lie: none is ever made larger than it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise WeightsError(f"{info.filename} is compressed in it, which torch.save never does")
    head = content[info.header_offset : info.header_offset + 30].tobytes()
    start = info.header_offset + 30 + int.from_bytes(head[26:28], "little")
    start += int.from_bytes(head[28:30], "little")
    if head[:4] != b"PK\3\4" or start + info.file_size > len(content):
        raise WeightsError(f"{info.filename} is not where its list of files says; it is cut")
    return content[start : start + info.file_size]


def _read_older(file: mmap.mmap, content: np.ndarray, shells: bool) -> tuple[Any, Values]:
    pickled = content[:2].tobytes() == b"\x80\x02"  # of protocol 2
    if not pickled or Reader(file).load() != _MAGIC:
        raise WeightsError("it does not start like a file of torch.save")
    Reader(file).load()  # version of the protocol
    if not Reader(file).load()["little_endian"]:
        raise WeightsError("its numbers are big-endian; save it again on another machine")
    reader = Reader(file, shells=shells)
    found = reader.load()
    arrays = {}
    keys = Reader(file).load()
    at = file.tell()
    for key in keys:
        dtype = np.dtype(DTYPES[reader.storages[key].dtype])
        numel = int.from_bytes(content[at : at + 8].tobytes(), "little")
        end = at + 8 + numel * dtype.itemsize
        if end > len(content):
            raise WeightsError("it ends before its values do; it is cut")
        arrays[key] = content[at + 8 : end].view(dtype)
        at = end
    return found, lambda storage: arrays[storage.key]


def _resolved(found: Any, values: Values, *, most: int) -> Any:
    """Puts arrays in place of descriptions; what is held twice is looked at once."""
    seen: dict[int, Any] = {}
    total = 0

    def walk(node):
        nonlocal total
        if id(node) in seen:
            return seen[id(node)][1]
        if isinstance(node, Tensor):
            new = _view(node, values(node.storage))
            total += new.nbytes
            if total > most:
                raise WeightsError("its tensors are much larger than the file; it is no honest one")
        elif isinstance(node, dict):
            new = {key: walk(value) for key, value in dict.items(node)}
        elif isinstance(node, list | tuple):
            new = type(node)(walk(value) for value in node)
        elif isinstance(node, Shell):
            seen[id(node)] = node, node  # modules may hold each other
            node.state = walk(node.state)
            return node
        else:
            return node
        seen[id(node)] = node, new  # and the node, so that its id stays its own
        return new

    return walk(found)


def _view(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    _, offset, shape, strides = tensor
    if not all(type(number) is int for number in (offset, *shape, *strides)):
        raise WeightsError("a tensor has a size that is no whole number")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    inside = offset >= 0 and min(strides, default=0) >= 0 and last < values.size
    count = 1
    for size in shape:
        count *= size
    fits = inside and min(shape, default=0) >= 0 and count <= values.size
    if values.size != tensor.storage.numel or (count and not fits):
        raise WeightsError(f"a tensor of shape {list(shape)} does not fit its values; it is cut")
    if not count:
        return np.empty(shape, values.dtype)
    steps = [step * values.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


def module_tensors(module: Shell) -> dict[str, np.ndarray]:
    """Parameters and buffers of a module, in which those of its parts come behind its own."""
    tensors, waiting, seen = {}, [("", module)], set()
    while waiting:
        prefix, part = waiting.pop(0)
        if id(part) in seen or not isinstance(part.state, dict):
            continue
        seen.add(id(part))
        groups = [part.state.get(key) for key in ("_parameters", "_buffers", "_modules")]
        # TorchScript keeps all of them as attributes
        content = [group for group in groups if isinstance(group, dict)] or [part.state]
        for name, value in (item for group in content for item in group.items()):
            if isinstance(value, np.ndarray):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Shell):
                waiting.append((f"{prefix}{name}.", value))
    return tensors
