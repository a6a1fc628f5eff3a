"""Which key each query may see, for the kinds of attention layer.

Letters: P text positions, G grid side, T = P + G * G positions in all.
Rules: Ramesh et al. 2021, figure 11 (its 22 x 22 panels are reproduced cell by cell in the tests).
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool

Kind = Literal["row", "column", "conv", "dense"]


def attention_mask(
    kind: Kind, *, text_length: int, grid: int, kernel: int = 11
) -> Bool[np.ndarray, "T T"]:
    """Lets text see earlier text, and an image position all text and what its layer kind allows.

    With p the raster position of the query in the image block and q <= p that of the key:
    row sees the G positions before p and p itself, across the row end (the far end lies one row
    above); column sees q with (p - q) mod G = 0; conv sees the distances p - q in
    {r G + (c mod G) : 0 <= r <= h, -h <= c <= h}, h = kernel // 2, so that its left half wraps
    around to the row end; dense sees every q.

    Args:
      kind: "row", "column", "conv", or "dense" (plainly causal in the image).
      text_length: text positions P, start token and padding included.
      grid: side G of the square of image positions.
      kernel: side of the convolution window, odd; only "conv" reads it.

    Returns:
      True where a query (first axis) may look at a key (second axis).

    Raises:
      ValueError: for an unknown kind, a size below 1, or an even kernel.

    Source: Ramesh et al. 2021, figure 11; that kernels above 3 follow its 3 x 3 panel is ours.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"attention kind is {kind!r}, but must be one of {list(get_args(Kind))}")
    for name, size in {"text_length": text_length, "grid": grid, "kernel": kernel}.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, but must be at least 1")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}, but must be odd, so that it has a middle")

    length = text_length + grid * grid
    positions = np.arange(grid * grid)
    distance = positions[:, None] - positions[None, :]  # I I
    seen = {
        "row": distance <= grid,
        "column": distance % grid == 0,
        "conv": np.isin(distance, _conv_distances(grid, kernel)),
        "dense": True,
    }[kind]

    mask = np.tri(length, dtype=bool)
    mask[text_length:, text_length:] &= seen
    return mask


def window_mask(*, grid: int, kernel: int = 11, wraps: bool) -> Bool[np.ndarray, "I I"]:
    """Lets an image position see those before it that lie in a square window around it.

    Args:
      grid: side G of the square of image positions.
      kernel: side of the window, odd.
      wraps: whether the window goes on at the opposite edge, of rows and of columns (ruDALL-E v2),
        or ends at the edge (v3).
    Source: the code of ruDALL-E.
    """

    def near(x):
        distance = np.abs(x[:, None] - x[None])
        return (np.minimum(distance, grid - distance) if wraps else distance) <= kernel // 2

    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.tri(grid * grid, dtype=bool) & near(row) & near(column)


def layer_kinds(depth: int) -> tuple[Kind, ...]:
    """Names the kind of each layer: row, column, row, row, and so on, the last one conv.

    Args:
      depth: number of layers L.

    Returns:
      One kind a layer; counted from 1, layer L is conv, 2, 6, 10, ... are column, the rest row.

    Raises:
      ValueError: if depth is below 1.

    Source: Ramesh et al. 2021, appendix B.1.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, but must be at least 1 layer")
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, depth)]
    return (*kinds, "conv")


def _conv_distances(grid: int, kernel: int) -> list[int]:
    half = kernel // 2
    return [r * grid + c % grid for r in range(half + 1) for c in range(-half, half + 1)]
