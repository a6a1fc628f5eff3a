"""Contact sheets: images in rows under their captions, and a safe way to save them."""

import io
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dalle_jax import atomic
from dalle_jax.errors import UserError
from dalle_jax.image.fonts import FONT_PX, typesetter
from dalle_jax.image.pixels import encode_png

CELL_PX = 128  # smaller images are magnified by a whole number to about this side
GAP_PX = 6
COLUMNS = 16  # images side by side; more of a row go on below
LINE_PX = math.ceil(FONT_PX * 1.4)
PAPER, INK = 240, 20  # grey, so that images on white keep their edges
GIF_PX = 65535  # longest side that the format knows


def contact_sheet(
    images: UInt8[np.ndarray, "rows n R R 3"], labels: Sequence[str] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays images out in a grid, each row under its label.

    Args:
      images: one row of n images per label; beyond `COLUMNS` it goes on in the next line.
      labels: one text per row, wrapped to the width of the sheet; None for no text. Characters that
        no font of the system has are written as escapes.
    Raises:
      ValueError: if there are no images, or not one label per row.
    """
    rows, n, R = images.shape[:3]
    if rows * n == 0:
        raise ValueError(f"a sheet needs at least one image, got {rows} rows of {n}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{rows} rows of images need {rows} labels, got {len(labels)}")
    plan = _plan(n, R, labels or [""] * rows)
    canvas = Image.new("L", (plan.width, plan.height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for lines, top in zip(plan.texts, plan.tops, strict=True):
        for i, line in enumerate(lines):
            typesetter().draw(draw, (GAP_PX, top + i * LINE_PX), line, INK)

    sheet = np.array(canvas.convert("RGB"))
    side = R * plan.factor
    for row, (lines, top) in enumerate(zip(plan.texts, plan.tops, strict=True)):
        for number in range(n):
            line, column = divmod(number, COLUMNS)
            y = top + len(lines) * LINE_PX + line * (side + GAP_PX)
            x = GAP_PX + column * (side + GAP_PX)
            image = images[row, number].repeat(plan.factor, axis=0).repeat(plan.factor, axis=1)
            sheet[y : y + side, x : x + side] = image
    return sheet


def check_gif(n: int, px: int, labels: Sequence[str]) -> None:
    """Checks before drawing that a sheet of n images a label can be saved as a GIF.

    Args:
      n: images in each row.
      px: their side R.
      labels: as for `contact_sheet`.
    Raises:
      UserError: if it would be too high or too wide.
    """
    plan = _plan(n, px, labels)
    if max(plan.width, plan.height) > GIF_PX:
        raise UserError(
            f"a sheet of {n} images for each of {len(labels)} captions has {plan.width} x "
            f"{plan.height} pixels, but a GIF at most {GIF_PX} a side; ask for fewer"
        )


class _Plan(NamedTuple):
    """Where everything lies, in pixels."""

    factor: int
    width: int
    height: int
    texts: list[list[str]]
    tops: list[int]
    """Of the text of each row; its images follow."""


def _plan(n: int, R: int, labels: Sequence[str]) -> _Plan:
    factor = max(1, round(CELL_PX / R))
    cell = R * factor + GAP_PX
    width = min(n, COLUMNS) * cell + GAP_PX
    texts = [typesetter().wrap(label, width - 2 * GAP_PX) for label in labels]
    heights = [len(lines) * LINE_PX + math.ceil(n / COLUMNS) * cell for lines in texts]
    *tops, end = itertools.accumulate(heights, initial=GAP_PX)
    return _Plan(factor, width, end, texts, tops)


def save_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG whole or not at all, making its folder if need be."""
    _write(path, encode_png(image))


def save_gif(
    path: str | os.PathLike,
    frames: Sequence[UInt8[np.ndarray, "H W 3"]] | UInt8[np.ndarray, "F H W 3"],
    *,
    seconds: float = 4.0,
) -> None:
    """Writes an animation whole or not at all; it shows its last frame as long as all others.

    Args:
      path: of the file.
      frames: at least one, none of a side above `GIF_PX`.
      seconds: that the others take in all.
    """
    stills = [Image.fromarray(frame) for frame in frames]
    each = round(1000 * seconds / max(len(frames) - 1, 1))
    buffer = io.BytesIO()
    stills[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=stills[1:],
        duration=[each] * (len(frames) - 1) + [round(1000 * seconds)],
        loop=0,
    )
    _write(path, buffer.getvalue())


def _write(path, data):
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, data)
