"""Arrays that stay in their file until they are used, so that weights are in memory once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True, kw_only=True, eq=False)
class LazyArray:
    """An array by its shape and type; numpy makes it where it is used, and it is not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray] = field(repr=False)
    """Gives the array; called at each use."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array, once it is made."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: DTypeLike) -> "LazyArray":
        """The same in another type; nothing is made."""
        return LazyArray(
            shape=self.shape,
            dtype=np.dtype(dtype),
            make=lambda: self.make().astype(dtype, copy=False),
        )

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        """The array, new each time."""
        array = self.make()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        """A part of the array; all of it is made for that."""
        return self.make()[index]


def materialized(array: Any) -> Any:
    """The array itself; one of numpy or JAX is as it was."""
    return np.asarray(array) if isinstance(array, LazyArray) else array
