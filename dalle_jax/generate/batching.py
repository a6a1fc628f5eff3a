"""Work cut into micro-batches, so that memory stays bounded whatever is asked for.

Source: ours.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MEMORY = 2**30  # bytes that one micro-batch may need besides the weights, about
LARGEST = 32  # pictures in a micro-batch; on 2 cores 8 to 64 take the same time a picture, 0.6 s


class Part(NamedTuple):
    """Some of the things that there are to do."""

    indices: np.ndarray
    """Numbers of things, as many for each part; the last one repeated where they run out."""
    new: int
    """How many of them are not repeated."""


def micro_batches(total: int, bytes_each: int, *, width: int = 1) -> Iterator[Part]:
    """Cuts `total` things into parts of one length.

    Lengths are 2**k or 3 * 2**k, so that all the requests of a session compile a few shapes only.

    Args:
      total: how many things there are.
      bytes_each: memory that a picture needs while it is worked on.
      width: pictures that one thing stands for.
    """
    if not total:
        return
    largest = max(1, min(LARGEST, MEMORY // bytes_each) // width)
    lengths = [s for k in range(largest.bit_length()) for s in (2**k, 3 * 2**k) if s <= largest]
    even = math.ceil(total / math.ceil(total / max(lengths)))
    length = min(s for s in lengths if s >= even)
    for start in range(0, total, length):
        indices = np.arange(start, start + length)
        yield Part(np.minimum(indices, total - 1), int((indices < total).sum()))


def rectangles(prompts: int, n: int, bytes_each: int) -> Iterator[tuple[Part, Part]]:
    """Cuts prompts x n pictures into rectangles, since samples of a prompt share its text.

    Returns:
      Of each rectangle the prompts and the numbers of the samples.
    """
    for columns in micro_batches(n, bytes_each):
        for rows in micro_batches(prompts, bytes_each, width=len(columns.indices)):
            yield rows, columns
