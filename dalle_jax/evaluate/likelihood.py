"""What a model's two networks reach on true pictures and captions, without drawing.

Letters: B pictures, R pixel side, G grid side, P text positions, I image positions, K codes.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.evaluate.drawing import PART, Part
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import decibels
from dalle_jax.losses import prior_loss
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.codec import code_use
from dalle_jax.models.prior_config import PriorConfig


def tokenizer_quality(model: Model, parts: Iterable[Part]) -> dict[str, float | int]:
    """Measures how well pictures survive being encoded and decoded.

    Returns:
      psnr, psnr_foreground: mean over pictures, in dB, see `image.pixels.decibels`;
      codes: distinct codes seen; perplexity: exp of the entropy of their frequencies.
    """
    counts = np.zeros(model.codec.codes, int)
    psnr, foreground = [], []
    for part in parts:
        images = part.images()
        codes = model.encode(images)
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        whole, seen = decibels(images, model.decode(codes))
        psnr.extend(whole)
        foreground.extend(seen)
    used, perplexity = code_use(counts)
    return {
        "psnr": float(np.mean(psnr)),
        "psnr_foreground": float(np.mean(foreground)),
        "codes": used,
        "perplexity": perplexity,
    }


def prior_nats(
    model: Model, parts: Iterable[Part], captions: Sequence[str], families: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Measures how likely the prior finds true captions and the codes of their pictures.

    Args:
      model: has an autoregressive prior.
      parts: the true picture of each caption.
      captions: one of each picture; those too long for the model are cut.
      families: kind of each.
    Returns:
      "text_nats" and "image_nats" per token for "all" and, if there are several, each family.
    Source: Ramesh et al. 2021, section 2.2.
    """
    config, params = model.priors["prior"]
    rows, found = [], []
    for part in parts:
        texts = model.tokenizer.encode(
            [captions[row] for row in part.rows],
            length=config.text_length - 1,
            overlong="truncate",
        )
        filled = np.minimum(np.arange(PART), len(part.rows) - 1)  # one shape to compile
        codes = model.encode(part.images()).reshape(len(part.rows), -1)
        measured = _nats(config, params, texts[filled], codes[filled])
        rows.extend(part.rows)
        found.append(np.stack(measured, axis=1)[: len(part.rows)])
    text, image, tokens = np.concatenate(found).astype(float).T
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
        _, metrics = prior_loss(*(part[None] for part in example))
        return metrics["text_nats"], metrics["image_nats"]

    text, image = jax.vmap(one)(text_logits, image_logits, texts, codes)
    return text, image, jnp.sum(texts < text_logits.shape[-1], axis=1)
