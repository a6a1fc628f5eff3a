"""Coloured shapes with captions, drawn on the fly: data for tests and for a first look.

Source: ours.
"""

import itertools

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.data.record import Record
from dalle_jax.image.pixels import encode_png

COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "black", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
SIZES = {"small": 0.5, "large": 0.9}
_DRAWN_PX = 256  # drawn large and scaled down, for smooth edges


class ShapesSource:
    """Every colour, shape and size once: 96 images, of which each tenth is for validation.

    Args:
      split: "train" or "validation".
      px: side of the images.
    """

    def __init__(self, split: str, *, px: int):
        cells = list(itertools.product(SIZES, COLOURS, SHAPES))
        held_out = cells[::10]
        self._cells = held_out if split == "validation" else sorted(set(cells) - set(held_out))
        self._px = px

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Record:
        size, colour, shape = self._cells[index]
        name = f"{size} {colour} {shape}"
        image = _draw(shape, colour, SIZES[size], self._px)
        return {
            "id": name.replace(" ", "-"),
            "image": encode_png(image),
            "captions": [f"a {name}", f"a picture of a {name}"],
        }


def _draw(shape: str, colour: str, size: float, px: int) -> np.ndarray:
    image = Image.new("RGB", (_DRAWN_PX, _DRAWN_PX), "white")
    draw = ImageDraw.Draw(image)
    middle, reach = _DRAWN_PX / 2, _DRAWN_PX / 2 * size
    low, high = middle - reach, middle + reach
    box, third = (low, low, high, high), reach / 3
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=round(2 * third))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle, low), (low, high), (high, high)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(middle, low), (low, middle), (middle, high), (high, middle)], fill=colour)
    else:  # a cross
        draw.rectangle((low, middle - third, high, middle + third), fill=colour)
        draw.rectangle((middle - third, low, middle + third, high), fill=colour)
    return np.asarray(image.resize((px, px), Image.Resampling.BOX))
