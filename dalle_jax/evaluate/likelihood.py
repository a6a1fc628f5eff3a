"""What codec and prior reach on true images and captions, without sampling.

Letters: B images, R pixel side, G grid side, P text positions, I image positions, K codes.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.evaluate.image_sets import BATCH, ImageBatch
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import decibels
from dalle_jax.losses import cross_entropy, prior_loss
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.codec import code_use
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig, ProgressivePrior


def codec_quality(model: Model, batches: Iterable[ImageBatch]) -> dict[str, float | int]:
    """Measures the reconstructions of images.

    Returns:
      psnr, psnr_foreground: mean over images, in dB, see `image.pixels.decibels`;
      codes: distinct codes seen; perplexity: exp of the entropy of their frequencies.
    """
    counts = np.zeros(model.codec.codes, int)
    psnr, foreground = [], []
    for batch in batches:
        images = batch.images()
        codes = model.encode(images)
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        of_image, of_foreground = decibels(images, model.decode(codes))
        psnr.extend(of_image)
        foreground.extend(of_foreground)
    used, perplexity = code_use(counts)
    return {
        "psnr": float(np.mean(psnr)),
        "psnr_foreground": float(np.mean(foreground)),
        "codes": used,
        "perplexity": perplexity,
    }


def prior_nats(
    model: Model,
    part: Literal["prior", "progressive"],
    batches: Iterable[ImageBatch],
    captions: Sequence[str],
    families: Sequence[str],
) -> dict[str, dict[str, float | int]]:
    """Measures how likely a prior finds true captions and the codes of their images.

    The progressive prior predicts one code a stage here, in raster order, as the autoregressive one
    does; it knows nothing of how likely captions are.

    Args:
      model: has that prior.
      part: which prior.
      batches: the true image of each caption.
      captions: one of each image; those too long for the model are cut.
      families: kind of each.
    Returns:
      "image_nats" per code and, of the autoregressive prior, "text_nats" per token, for "all" and,
      if there are several, each family.
    Source: Ramesh et al. 2021, section 2.2; of the progressive prior ours.
    """
    config, params = model.priors[part]
    rows, nats = [], []
    for batch in batches:
        texts = model.tokenizer.encode(
            [captions[row] for row in batch.rows],
            length=config.text_length - 1,
            overlong="truncate",
        )
        filled = np.minimum(np.arange(BATCH), len(batch.rows) - 1)  # one shape to compile
        codes = model.encode(batch.images()).reshape(len(batch.rows), -1)
        measured = _nats(config, params, texts[filled], codes[filled])
        rows.extend(batch.rows)
        nats.append(np.stack(measured, axis=1)[: len(batch.rows)])
    image, *of_text = np.concatenate(nats).astype(float).T
    kinds = np.asarray([families[row] for row in rows])
    chosen = {"all": np.ones(len(rows), bool)}
    if len(set(families)) > 1:
        chosen |= {family: kinds == family for family in sorted(set(families))}

    def means(where):
        found = {"captions": int(where.sum()), "image_nats": float(image[where].mean())}
        if of_text:
            text, tokens = (x[where] for x in of_text)
            found["text_nats"] = float((text * tokens).sum() / tokens.sum())
        return found

    return {family: means(where) for family, where in chosen.items()}


@functools.partial(jax.jit, static_argnums=0)
def _nats(config: PriorConfig | ProgressiveConfig, params, texts, codes):
    """Nats per code of each example by itself; those per text token, if any, and its tokens."""
    if isinstance(config, ProgressiveConfig):
        stage = jnp.broadcast_to(jnp.arange(config.image_length), codes.shape)
        logits = ProgressivePrior(config).apply({"params": params}, texts, codes, stage)
        return (cross_entropy(logits, codes).mean(axis=1),)
    text_logits, image_logits = AutoregressivePrior(config).apply({"params": params}, texts, codes)

    def one(*example):
        _, metrics = prior_loss(*(field[None] for field in example))
        return metrics["image_nats"], metrics["text_nats"]

    image, text = jax.vmap(one)(text_logits, image_logits, texts, codes)
    return image, text, jnp.sum(texts < text_logits.shape[-1], axis=1)
