"""Edits: which cells of an image are sampled again, and how the result is blended in.

Letters: R pixel side, G grid side, B images. Source: ours; Chang et al. 2022, section 4.3, for
editing by masked cells.
"""

import os

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import ArrayLike
from PIL import Image, ImageFilter

from dalle_jax.errors import UserError
from dalle_jax.image.pixels import decode, square

COLOURLESS = 64  # greatest difference between the channels of a grey pixel, which JPEG may colour


def masked_cells(
    mask: str | os.PathLike | ArrayLike | Image.Image, size: tuple[int, int], *, px: int, grid: int
) -> Bool[np.ndarray, "G G"]:
    """Reads a mask: the cells of which it marks a pixel.

    Args:
      mask: an image without colours, brighter than middle grey where the image is to be sampled
        again; what is transparent is not marked. A file, an image of Pillow, or an array: bool
        [H, W], True there, or uint8 [H, W], [H, W, 3] or [H, W, 4].
      size: height and width of that image, which is scaled and cut to px as the mask will be.
      px: side R that codes stand for.
      grid: G.
    Raises:
      UserError: if the mask has another size, marks nothing, or has colours.
      ImageError: if it cannot be read.
    """
    name = "the mask"
    if isinstance(mask, str | os.PathLike):
        name, mask = f"the mask {os.fspath(mask)}", decode(mask, background="black")
    marked = _marked(mask, name)
    if marked.shape != size:
        sides = [f"{W} x {H}" for H, W in (marked.shape, size)]
        raise UserError(f"{name} has {sides[0]} pixels and its image {sides[1]}; make them one")
    white = np.repeat(np.where(marked, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    pixels = square(white, px)[..., 0] > 127
    cells = pixels.reshape(grid, px // grid, grid, px // grid).any(axis=(1, 3))
    if not cells.any():
        raise UserError(f"{name} marks nothing; paint white what is to be sampled again")
    return cells


def _marked(mask, name) -> Bool[np.ndarray, "H W"]:
    if isinstance(mask, Image.Image):
        mask = mask.convert("RGBA")
    mask = np.asarray(mask)
    if mask.dtype == bool and mask.ndim == 2:
        return mask
    if mask.dtype != np.uint8 or mask.ndim not in (2, 3) or mask.shape[2:] not in ((), (3,), (4,)):
        raise UserError(
            f"{name} is {mask.dtype} {list(mask.shape)}; it must be bool [H, W], or uint8 [H, W], "
            "[H, W, 3] or [H, W, 4] with values from 0 to 255"
        )
    if mask.ndim == 2:
        return mask > 127
    colours = mask[..., :3].astype(int)
    if mask.shape[-1] == 4:  # on black
        colours = colours * mask[..., 3:] // 255
    coloured = np.argwhere(np.ptp(colours, axis=-1) > COLOURLESS)
    if len(coloured):
        y, x = coloured[0]
        raise UserError(
            f"{name} has the colour {tuple(colours[y, x].tolist())} at x={x}, y={y}; paint white "
            "what is to be sampled again, and leave the rest black or transparent"
        )
    return colours.mean(axis=-1) > 127.5


def random_cells(strength: float, grid: int, *, n: int, seed: int) -> Bool[np.ndarray, "n G G"]:
    """Random cells to sample again, the same number for each of n variations.

    Args:
      strength: share of the cells, above 0 and at most 1; at least one is sampled again.
      grid: G.
      n: images; the cells of image j depend on seed and j alone.
      seed: as for `Model.generate`.
    Raises:
      UserError: if the strength is out of its range.

    >>> random_cells(0.25, 4, n=2, seed=0).sum(axis=(1, 2)).tolist()
    [4, 4]
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}, but must be above 0 and at most 1, of the cells")
    count = max(1, round(strength * grid**2))
    cells: np.ndarray = np.zeros((n, grid**2), bool)
    for j in range(n):
        cells[j, np.random.default_rng((seed, j)).permutation(grid**2)[:count]] = True
    return cells.reshape(n, grid, grid)


def blend(
    old: UInt8[np.ndarray, "R R 3"],
    new: UInt8[np.ndarray, "*B R R 3"],
    edited: Bool[np.ndarray, "G G"],
) -> UInt8[np.ndarray, "*B R R 3"]:
    """Blends the edited cells into the old image.

    Around them the pixels change from new to old over half a cell; further away they are exactly
    the old ones.
    """
    factor = len(old) // len(edited)
    border = factor // 2
    inside = Image.fromarray(np.kron(edited, np.full((factor, factor), 255)).astype(np.uint8))
    share = np.asarray(inside) / 255
    for step in range(1, border + 1):
        inside = inside.filter(ImageFilter.MaxFilter(3))  # one pixel further on every side
        share = np.maximum(share, (np.asarray(inside) / 255) * (1 - step / (border + 1)))
    share = share[..., None]
    return np.rint(share * new + (1 - share) * old).astype(np.uint8)
