"""What codec and prior reach on true images and captions, without sampling.

Letters: B images, R pixel side, G grid side, P text positions, I image positions, K codes.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.evaluate.image_sets import BATCH, ImageBatch
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import decibels
from dalle_jax.losses import prior_loss
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.codec import code_use
from dalle_jax.models.prior_config import PriorConfig


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
    model: Model, batches: Iterable[ImageBatch], captions: Sequence[str], families: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Measures how likely the prior finds true captions and the codes of their images.

    Args:
      model: has an autoregressive prior.
      batches: the true image of each caption.
      captions: one of each image; those too long for the model are cut.
      families: kind of each.
    Returns:
      "text_nats" and "image_nats" per token for "all" and, if there are several, each family.
    Source: Ramesh et al. 2021, section 2.2.
    """
    config, params = model.priors["prior"]
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
    text, image, tokens = np.concatenate(nats).astype(float).T
    kinds = np.asarray([families[row] for row in rows])
    chosen = {"all": np.ones(len(rows), bool)}
    if len(set(families)) > 1:
        chosen |= {family: kinds == family for family in sorted(set(families))}
    return {
        family: {
            "captions": int(where.sum()),
            "image_nats": float(image[where].mean()),
            "text_nats": float((text * tokens)[where].sum() / tokens[where].sum()),
        }
        for family, where in chosen.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _nats(config: PriorConfig, params, texts, codes):
    """Nats per text token, per image token, and text tokens, of each example by itself."""
    text_logits, image_logits = AutoregressivePrior(config).apply({"params": params}, texts, codes)

    def one(*example):
        _, metrics = prior_loss(*(field[None] for field in example))
        return metrics["text_nats"], metrics["image_nats"]

    text, image = jax.vmap(one)(text_logits, image_logits, texts, codes)
    return text, image, jnp.sum(texts < text_logits.shape[-1], axis=1)
