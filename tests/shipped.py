"""What the shipped models make of fixed captions and images, for the golden codes."""

import numpy as np
from networks import pictures

from dalle_jax.generate.code_sampler import sample_codes
from dalle_jax.generate.sampling import SamplingConfig

# What a prior is sampled with: noise, filters and guidance all take part.
SAMPLING = SamplingConfig(temperature=0.9, top_k=200, top_p=0.98, guidance=2.0)
TILE = 8  # pixels


def sampled(model, part, captions, *, params=None):
    """Codes [captions, G, G] that a prior of a model samples, one grid for each caption."""
    sizes, own = model.priors[part]
    params = own if params is None else params
    grids = np.zeros((len(captions), sizes.grid, sizes.grid), int)
    options = {"n": 1, "seed": 7, "sampling": SAMPLING}
    for found in sample_codes(sizes, params, model.tokenizer, captions, **options):
        grids[found.prompts] = found.passes[-1][:, 0]
    return grids


def encoded(model):
    """Codes [2, G, G] of an image of ramps and one of noise."""
    return model.encode(pictures(model.px))


def tiles(model, grids):
    """Mean colours of the images of grids of codes: [B, R / 8, R / 8, 3], 0 to 255."""
    images = model.decode(np.asarray(grids, np.int32)).astype(float)
    B, R = images.shape[:2]
    return images.reshape(B, R // TILE, TILE, R // TILE, TILE, 3).mean((2, 4))


def scores(model, captions, grids):
    """How well the model's CLIP finds the images of the codes to fit, [captions]."""
    return model.clip.score(captions, model.decode(np.asarray(grids, np.int32))[:, None])[:, 0]
