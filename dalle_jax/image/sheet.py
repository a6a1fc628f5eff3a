"""Contact sheets: pictures in rows under their captions, and a safe way to save them."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dalle_jax.image.pixels import encode_png

CELL_PX = 128  # smaller pictures are magnified by a whole number to about this side
GAP_PX = 6
FONT_PX = 16
PAPER, INK = 240, 20  # grey, so that pictures on white keep their edges


def contact_sheet(
    images: UInt8[np.ndarray, "rows n R R 3"], labels: Sequence[str] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays pictures out in a grid, each row under its label.

    Args:
      images: one row of n pictures per label.
      labels: one text per row, wrapped to the width of the sheet; None for no text.
    Raises:
      ValueError: if there are no pictures, or not one label per row.
    """
    rows, n, R = images.shape[:3]
    if rows * n == 0:
        raise ValueError(f"a sheet needs at least one picture, got {rows} rows of {n}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{rows} rows of pictures need {rows} labels, got {len(labels)}")
    factor = max(1, round(CELL_PX / R))
    cell = R * factor + GAP_PX
    font = ImageFont.load_default(FONT_PX)
    wrapped = [_wrap(label, n * cell - GAP_PX, font) for label in labels or [""] * rows]
    line_px = math.ceil(FONT_PX * 1.4)
    text_px = [line_px * len(lines) for lines in wrapped]

    sheet = Image.new("L", (n * cell + GAP_PX, rows * cell + GAP_PX + sum(text_px)), PAPER)
    draw = ImageDraw.Draw(sheet)
    tops = [GAP_PX + row * cell + sum(text_px[: row + 1]) for row in range(rows)]
    for lines, top, height in zip(wrapped, tops, text_px, strict=True):
        for i, line in enumerate(lines):
            draw.text((GAP_PX, top - height + i * line_px), line, fill=INK, font=font)

    canvas = np.array(sheet.convert("RGB"))
    magnified = images.repeat(factor, axis=2).repeat(factor, axis=3)
    for row, top in enumerate(tops):
        for column in range(n):
            left = GAP_PX + column * cell
            canvas[top : top + R * factor, left : left + R * factor] = magnified[row, column]
    return canvas


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text at spaces into lines of at most `width` pixels (a longer word stays whole)."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG whole or not at all, making its folder if need be."""
    _write(path, encode_png(image))


def save_gif(
    path: str | os.PathLike, frames: UInt8[np.ndarray, "F H W 3"], *, seconds: float = 4.0
) -> None:
    """Writes an animation whole or not at all; it shows its last frame as long as all others.

    Args:
      path: of the file.
      frames: at least one.
      seconds: that the others take in all.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    each = round(1000 * seconds / max(len(frames) - 1, 1))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[each] * (len(frames) - 1) + [round(1000 * seconds)],
        loop=0,
    )
    _write(path, buffer.getvalue())


def _write(path, data):
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
