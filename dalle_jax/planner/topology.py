"""TPUs that are not here: devices to compile for, by the TPU's own compiler.

Needs `pip install dalle_jax[tpu]`, which brings that compiler (libtpu), and no TPU. Nothing that is
compiled so can run.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dalle_jax.errors import UserError

GENERATIONS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5", 3), "v6e": ("v6e", 2)}
"""Names people use: the compiler's name, and in how many dimensions chips are connected."""
_WRAPPED = 128  # chips from which on a v4 or v5p slice is a torus; for the others, 256


def tpu_devices(topology: str) -> Sequence[Any]:
    """Gives the devices of a slice of TPUs, for a mesh that programs are compiled for.

    Args:
      topology: generation and chips along each dimension, such as "v5e:4x4" or "v5p:2x2x4"; each
        size is 1 or even.
    Returns:
      One device a chip.
    Raises:
      UserError: for a topology that does not exist, or without libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match is None or match[1] not in GENERATIONS:
        raise UserError(
            f"topology is {topology!r}, but must be a generation ({', '.join(GENERATIONS)}) and "
            "its chips along each dimension, such as v5e:4x4 or v5p:2x2x4"
        )
    name, dimensions = GENERATIONS[match[1]]
    sizes = [int(size) for size in match[2].split("x")]
    if len(sizes) != dimensions or any(size != 1 and size % 2 for size in sizes):
        raise UserError(
            f"topology is {topology!r}, but {match[1]} has {dimensions} dimensions, each 1 or even"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs their compiler: pip install dalle_jax[tpu] (Linux, x86-64)"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for a TPU's host otherwise
    sizes += [1] * (3 - len(sizes))
    torus = math.prod(sizes) >= (_WRAPPED if dimensions == 3 else 2 * _WRAPPED)
    host = tuple(min(size, most) for size, most in zip(sizes, (2, 2, 1), strict=True))
    try:
        found = topologies.get_topology_desc(
            f"{name}:{'x'.join(map(str, sizes[:dimensions]))}",
            platform="tpu",
            chip_config_name="megacore" if name == "v4" else "default",
            chips_per_host_bounds=host,
            num_slices=1,
            wrap=(torus,) * 3,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler knows no topology {topology!r}: {error}") from error
    return found.devices
