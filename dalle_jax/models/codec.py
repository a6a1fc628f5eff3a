"""What turns images into codes and back: a dVAE or a VQ-GAN, for those who need not know which.

A config says which of them it is, has a `factor` f = R / G and a number of `codes` K, and each
network has the functions named here in its own file.

Letters: B batch, R pixel side, G grid side, K codes.
"""

import numpy as np
from jaxtyping import Array, Float16, Int, Key, PyTree, UInt8

from dalle_jax.models import dvae, maskgit_vqgan, vqgan
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGANConfig
from dalle_jax.models.vqgan import VQGANConfig

CodecConfig = DVAEConfig | VQGANConfig | MaskGITVQGANConfig

KINDS: dict[str, type] = {
    "dvae": DVAEConfig,
    "vqgan": VQGANConfig,
    "maskgit_vqgan": MaskGITVQGANConfig,
}
"""By the names that stages, files and fingerprints have."""
TITLES = {"dvae": "dVAE", "vqgan": "VQ-GAN", "maskgit_vqgan": "VQ-GAN of MaskGIT"}
"""The same for people."""
_NETWORKS = {"dvae": dvae, "vqgan": vqgan, "maskgit_vqgan": maskgit_vqgan}


def kind(config: CodecConfig) -> str:
    """Which of `KINDS` it is."""
    return next(name for name, cls in KINDS.items() if isinstance(config, cls))


def init_params(config: CodecConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters in float32."""
    return _NETWORKS[kind(config)].init_params(config, key)


def codes_and_errors(
    config: CodecConfig, params: PyTree, images: UInt8[Array | np.ndarray, "B R R 3"]
) -> tuple[Int[Array, "B G G"], Float16[Array, "B G G"]]:
    """Codes of images, without noise, and how badly each cell's code fits it.

    Args:
      config: of the network.
      params: its nested parameters.
      images: squares with a side that is a multiple of f.
    Returns:
      The code of each cell, and its error, which grows as the fit becomes worse: the squared
      distance to the code (VQ-GAN), or minus the greatest logit (dVAE).
    Source: the errors: Fei et al. 2022; of the dVAE, as in the first author's prototype.
    """
    return _NETWORKS[kind(config)].codes_and_errors(config, params, images)


def decode(
    config: CodecConfig, params: PyTree, codes: Int[Array | np.ndarray, "B G G"]
) -> UInt8[Array, "B R R 3"]:
    """Images of codes, to look at."""
    return _NETWORKS[kind(config)].decode(config, params, codes)


def code_use(counts: Int[np.ndarray, " K"]) -> tuple[int, float]:
    """How many codes are in use, and the perplexity: exp of the entropy of their frequencies.

    Args:
      counts: how often each code was seen; some code at least once.
    """
    frequency = counts[counts > 0] / counts.sum()
    return int((counts > 0).sum()), float(np.exp(-np.sum(frequency * np.log(frequency))))
