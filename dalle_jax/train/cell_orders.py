"""In which order the cells of an image come while a prior learns.

Letters: B batch, I = G * G cells, G grid side. A low score comes first. Source: Fei et al. 2022 for
the quantisation error and dynamic importance, in our reading; the others are controls. Orders that
are annealed: Yu et al. 2024 (RAR, arXiv 2411.00776).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Order = Literal["dynamic", "certain", "uncertain", "random", "raster", "centre"]
ANNEALED = (0.5, 0.75)  # parts of training between which random orders become raster order


def order_scores(
    order: Order,
    key: Key[Array, ""],
    shape: tuple[int, int],
    *,
    difficulty: Float[Array, "B I"] | None = None,
    errors: Float[Array, "B I"] | None = None,
) -> Float[Array, "B I"]:
    """Scores the cells of each image; those with a low one are filled first.

    Args:
      order: "dynamic": what the model in training finds easiest, given the caption alone;
        "certain": the cells that their codes fit best; "uncertain": those that they fit worst;
        "random"; "raster"; "centre": from the middle of the grid outwards.
      key: for "random".
      shape: images B and cells I.
      difficulty: nats of each code, given the caption alone, for "dynamic".
      errors: how badly each code fits its cell, for "certain" and "uncertain".
    Raises:
      ValueError: if an order needs difficulties or errors and there are none.
    """
    needed = {"dynamic": difficulty, "certain": errors, "uncertain": errors}
    if order in needed:
        scores = needed[order]
        if scores is None:
            what = "difficulties" if order == "dynamic" else "errors"
            raise ValueError(f'the order "{order}" needs the {what} of the codes in each batch')
        return -scores if order == "uncertain" else scores
    cell = np.arange(shape[1])
    if order == "raster":
        return jnp.broadcast_to(jnp.asarray(cell, jnp.float32), shape)
    if order == "centre":
        G = math.isqrt(len(cell))
        from_middle = np.abs(np.stack(np.divmod(cell, G)) - (G - 1) / 2).max(0)
        return jnp.broadcast_to(jnp.asarray(from_middle, jnp.float32), shape)
    return jax.random.uniform(key, shape)


def order_ranks(scores: Float[Array, "B I"]) -> Int[Array, "B I"]:
    """The place of each cell in the order of the scores, from 0; equal ones in raster order."""
    return jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1)


def random_share(progress: Float[Array, ""] | float) -> Float[Array, ""]:
    """The share of images in a random order, from 1 to 0, once a part of training is done."""
    begin, end = ANNEALED
    return 1 - jnp.clip((progress - begin) / (end - begin), 0, 1)


def mixed_orders(
    key: Key[Array, ""], shape: tuple[int, int], share: Float[Array, ""] | float
) -> Int[Array, "B I"]:
    """Cells of each image: in a random order for a share of the images, else in raster order.

    Args:
      key: for the choice of the images and their orders.
      shape: images B and cells I.
      share: chance of a random order, in [0, 1].
    """
    chosen = jax.random.uniform(jax.random.fold_in(key, 1), (shape[0], 1)) < share
    raster = order_scores("raster", key, shape)
    return jnp.argsort(jnp.where(chosen, order_scores("random", key, shape), raster), axis=-1)
