"""State dicts of others: reads them, and the sizes that names and shapes of their tensors say."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.torch_file import read_torch

Tensors = dict[str, np.ndarray]


def read_state_dict(file: Path) -> Tensors:
    """Tensors of a file, which may lie below "state_dict" (Lightning) or "model".

    Raises:
      WeightsError: if the file is damaged, or holds anything else there.
    """
    content = read_torch(file, shells=True)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    odd = [str(name) for name, value in content.items() if not isinstance(value, np.ndarray)]
    if odd or not content:
        raise WeightsError(f"{file} holds more than tensors or none at all ({', '.join(odd[:4])})")
    return content


def count(tensors: Mapping[str, np.ndarray], pattern: str, *, first: int = 0) -> int:
    """How many numbers there are where the pattern has its group: first, first + 1 and so on.

    Raises:
      WeightsError: if there are none, or some are left out.
    """
    numbers = {
        int(match[1]) for match in (re.fullmatch(pattern, name) for name in tensors) if match
    }
    if not numbers or numbers != set(range(first, first + len(numbers))):
        raise WeightsError(
            f"it has no tensors {pattern.replace(chr(92), '')} that are numbered from {first} on; "
            "is it a file of this source?"
        )
    return len(numbers)


def shape_of(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor; WeightsError if it is missing or has another number of axes."""
    if name not in tensors or tensors[name].ndim != axes:
        has = list(tensors[name].shape) if name in tensors else "missing"
        raise WeightsError(
            f"its tensor {name} is {has}, wanted {axes} axes; is it a file of this source?"
        )
    return tensors[name].shape
