"""Weights as they are stored: named tensors, rounded, in a file, and their fingerprint."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dalle_jax.generate.model_folder import ModelError
from dalle_jax.lazy_array import LazyArray, materialized
from dalle_jax.parallel.sharding_rules import PRIOR, shardings

# Kernels next to the codes, where rounding changes codes: with all kernels in bfloat16 the shipped
# dVAE gave 46 % of the cells the same code, with these in float32 99 %.
EXACT = ("encoder/output/", "decoder/input/", "encoder/conv_out/", "quant_conv/", "head/")

CHUNK = 2**26  # bytes of a sharded tensor that are copied to the host at a time
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # names in safetensors
_NUMPY_DTYPES = {short: np.dtype(name) for name, short in _DTYPES.items()}

Dtype = Literal["float32", "bfloat16"]
Tensors = dict[str, Any]
"""Arrays of numpy, of JAX where they are sharded over devices, or `LazyArray`s of a file."""


def flatten_params(params: Any) -> dict[str, Any]:
    """Leaves of nested parameters by the names they are stored under, sorted."""
    return dict(sorted(flax.traverse_util.flatten_dict(params, sep="/").items()))


def to_tensors(params: Any, *, kernels: Dtype = "bfloat16") -> Tensors:
    """Flattens nested parameters and rounds the kernels to bfloat16, as they are stored.

    With `kernels` in float32 nothing is rounded. Sharded arrays stay on their devices, and
    lazy ones in their files.

    Source: Ramesh et al. 2021, appendix D, keeps gains, biases, embeddings and unembeddings in
    float32, and the released dVAE its convolutions next to the codes.
    """
    return {name: _rounded(name, array, kernels) for name, array in flatten_params(params).items()}


def nest(tensors: Tensors) -> Any:
    """Nested parameters of tensors."""
    return flax.traverse_util.unflatten_dict(tensors, sep="/")


def place(
    tensors: Tensors, *, dtype: Dtype = "float32", mesh: Mesh | None = None
) -> tuple[str, Any]:
    """Puts tensors on devices one after the other, so that lazy ones are in memory once.

    Args:
      tensors: of a model; those that are sharded stay where they are.
      dtype: float32, to which all are widened, or bfloat16, to which kernels are rounded as
        `to_tensors` does.
      mesh: devices that the weights of a prior are sharded over; None for one device.
    Returns:
      Their fingerprint as they are stored, and nested parameters.
    """
    wanted = {} if mesh is None else flatten_params(shardings(nest(tensors), mesh, PRIOR))
    found, params = Fingerprint(), {}
    for name in sorted(tensors):
        tensor = materialized(tensors[name])
        found.add(name, tensor)
        tensor = _rounded(name, tensor, dtype)
        if mesh is not None or not is_sharded(tensor):
            tensor = jax.device_put(tensor, wanted.get(name))
        params[name] = tensor
    return str(found), nest(params)


def stored_dtype(name: str, kernels: Dtype) -> np.dtype:
    """Type that a tensor of this name is rounded to, if kernels are stored in that type."""
    exact = kernels == "float32" or not name.endswith("kernel") or name.startswith(EXACT)
    return np.dtype(np.float32 if exact else ml_dtypes.bfloat16)


def _rounded(name: str, array: Any, kernels: Dtype) -> Any:
    dtype = stored_dtype(name, kernels)
    if is_sharded(array) or isinstance(array, LazyArray):
        return array.astype(dtype)
    return np.asarray(array, dtype)


class Fingerprint:
    """Sha256 over names, dtypes, shapes and bytes of tensors, added in the order of the names."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Any) -> None:
        """Adds a tensor."""
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for chunk in host_chunks(tensor):
            self._digest.update(chunk.reshape(-1).view(np.uint8).data)

    def __str__(self):
        return self._digest.hexdigest()


def fingerprint(tensors: Tensors) -> str:
    """That of some tensors; they may be in any order."""
    found = Fingerprint()
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return str(found)


def host_chunks(tensor: Any) -> Iterator[np.ndarray]:
    """Copies a tensor to the host, a few of its rows at a time if it is sharded.

    If it is sharded over several processes, all of them call this.
    """
    if not is_sharded(tensor):
        yield np.ascontiguousarray(tensor)
        return
    rows = len(tensor)
    most = max(CHUNK * rows // tensor.nbytes, 1)
    for start in range(0, rows, most):
        # The index is no constant, so that one program cuts all pieces of a length.
        chunk = jax.lax.dynamic_slice_in_dim(tensor, start, min(most, rows - start))
        if not chunk.is_fully_addressable:
            chunk = multihost_utils.process_allgather(chunk, tiled=True)
        yield np.asarray(chunk)


def is_sharded(array: Any) -> bool:
    """Whether it is an array of JAX whose parts are on different devices."""
    return not getattr(array, "is_fully_replicated", True)


def read_tensors(path: Path) -> dict[str, LazyArray]:
    """Opens a safetensors file, whose values stay there until they are used.

    Raises:
      ModelError: if it is missing or cut short; at a use, if it no longer is as it was.
    """
    with _opened(path) as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            described = file.get_slice(name)
            tensors[name] = LazyArray(
                shape=tuple(described.get_shape()),
                dtype=_NUMPY_DTYPES[described.get_dtype()],
                make=partial(_read_tensor, path, name),
            )
        return tensors


def _read_tensor(path, name):
    # opened anew for each: what is mapped is held as long as the file is open
    with _opened(path) as file:
        return file.get_tensor(name)


@contextmanager
def _opened(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"cannot read the weights {path}: missing or damaged ({error}); restore the file"
        ) from error


def write_tensors(path: Path | None, tensors: Tensors) -> None:
    """Writes a safetensors file, in chunks; the library would need all bytes at once.

    Args:
      path: of the file; None in a process that holds shards, while another one writes.
      tensors: arrays on the host, or sharded over devices.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(os.devnull if path is None else path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in host_chunks(tensors[name]):
                file.write(chunk.tobytes())
