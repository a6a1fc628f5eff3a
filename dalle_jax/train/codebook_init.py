"""A start for the codebook in which every code already means something.

Source: ours. Of random codes most never win a cell and die within a few hundred updates. Clusters
of the untrained encoder's features give each of them a part of the images at once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt8

from dalle_jax.errors import UserError
from dalle_jax.models import dvae, vqgan
from dalle_jax.models.dvae import DVAE, DVAEConfig
from dalle_jax.models.vqgan import VQGAN, VQGANConfig

ROUNDS = 10  # of k-means; the mean distance falls by less than 1 % in the last ones
SHARPNESS = 2.0  # nats by which a cell at the mean distance prefers its own cluster's centre


def kmeans_init(
    key: Key[Array, ""], params: PyTree, config: DVAEConfig, images: UInt8[np.ndarray, "B R R 3"]
) -> PyTree:
    """Sets the encoder's last and the decoder's first convolution from clusters of features.

    The encoder's logit of code k becomes -s |h - c_k|^2, up to what all codes share, with h the
    features of a cell and c_k a centre; the decoder starts from a random rotation of the centres'
    principal components, of unit mean square.

    Args:
      key: for the choice of first centres and the rotation.
      params: a dVAE's, freshly initialised; the given tree is left as it was.
      config: of that dVAE.
      images: some hundreds of training images.
    Returns:
      Parameters of the same structure.
    Raises:
      UserError: if the images have fewer different cells than there are codes.
    Source: ours.
    """
    key_centres, key_rotation = jax.random.split(key)
    D = params["encoder"]["output"]["kernel"].shape[2]
    shown = DVAE(dataclasses.replace(config, codes=D))  # an identity at its end shows the features
    output = {"kernel": jnp.eye(D)[None, None], "bias": jnp.zeros(D)}
    encoder = {"params": {"encoder": {**params["encoder"], "output": output}}}

    def features(x):
        return shown.apply(encoder, dvae.preprocess(x), method="encode")

    centres, distance = clusters(key_centres, features, config.codes, images)
    s = SHARPNESS / distance
    output = {"kernel": 2 * s * centres.T[None, None], "bias": -s * jnp.square(centres).sum(-1)}
    table = {**params["decoder"]["input"], "kernel": _spread(key_rotation, centres, config)}
    return {
        "encoder": {**params["encoder"], "output": output},
        "decoder": {**params["decoder"], "input": table},
    }


def kmeans_codebook(
    key: Key[Array, ""], params: PyTree, config: VQGANConfig, images: UInt8[np.ndarray, "B R R 3"]
) -> PyTree:
    """Sets the codebook of a VQ-GAN to clusters of the untrained encoder's features.

    Args, Returns and Raises are those of `kmeans_init`.
    """

    def features(x):
        return VQGAN(config).apply({"params": params}, vqgan.preprocess(x), method="encode")

    centres, _ = clusters(key, features, config.codes, images)
    return {**params, "quantize": {"embedding": centres}}


def clusters(key, features: Callable, codes: int, images):
    """Centres of the clusters of all cells, and their mean squared distance in the last round."""
    cells = _different_cells(features, images)
    if len(cells) < codes:
        raise UserError(
            f"the {len(images)} images for the k-means start have {len(cells)} different cells, "
            f"fewer than the {codes} codes; give more images or fewer codes"
        )
    cells = jnp.asarray(cells)[jax.random.permutation(key, len(cells))]
    centres = cells[:codes]
    for _ in range(ROUNDS):
        centres, distance = _lloyd(cells, centres)
    return centres, distance


def _different_cells(features, images) -> Float[np.ndarray, "cells D"]:
    """Features of all grid cells, without repeats, so that flat areas count once."""
    features = jax.jit(features)
    parts = [np.asarray(features(images[i : i + 64])) for i in range(0, len(images), 64)]
    cells = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    scale = np.abs(cells).mean()
    _, first = np.unique(np.round(cells / (1e-3 * scale)), axis=0, return_index=True)
    return cells[np.sort(first)]


@jax.jit
def _lloyd(cells, centres):
    """One round of k-means, and the mean squared distance before it."""
    K = len(centres)

    def nearest(chunk):  # in chunks: all distances at once would be cells x K
        distances = jnp.square(centres).sum(-1)[None] - 2 * chunk @ centres.T
        return jnp.argmin(distances, axis=-1), jnp.min(distances, axis=-1)

    chunks = cells[: len(cells) // 1024 * 1024].reshape(-1, 1024, cells.shape[-1])
    if not len(chunks):
        chunks = cells[None]
    owner, distance = jax.lax.map(nearest, chunks)
    used = chunks.reshape(-1, cells.shape[-1])
    owner = owner.reshape(-1)
    size = jax.ops.segment_sum(jnp.ones(len(used)), owner, K)[:, None]
    total = jax.ops.segment_sum(used, owner, K)
    moved = jnp.where(size > 0, total / jnp.maximum(size, 1), centres)
    return moved, jnp.mean(distance.reshape(-1) + jnp.square(used).sum(-1))


def _spread(key, centres, config) -> Float[Array, "1 1 K code_width"]:
    centred = centres - centres.mean(axis=0, keepdims=True)
    _, _, directions = jnp.linalg.svd(centred, full_matrices=False)
    parts = centred @ directions[: config.code_width].T  # K, at most code_width
    parts = jnp.pad(parts, ((0, 0), (0, config.code_width - parts.shape[1])))
    rotation, _ = jnp.linalg.qr(jax.random.normal(key, (config.code_width,) * 2))
    table = parts @ rotation
    return (table / jnp.sqrt(jnp.square(table).mean()))[None, None]
