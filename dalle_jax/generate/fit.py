"""Whether the parts of a model fit each other.

Source: ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.generate import folder as files
from dalle_jax.generate.folder import ModelError, Tensors
from dalle_jax.models.dvae import DVAE, DVAEConfig
from dalle_jax.models.transformer import PriorConfig, draw_params

STYLES = {"prior": "autoregressive", "progressive": "progressive"}
"""What each part that draws codes is called in `PriorConfig`."""

Shapes = dict[str, jax.ShapeDtypeStruct]  # by the names that weights are stored by


def check_parts(model: Any, priors: dict[str, PriorConfig]) -> None:
    """Raises a ModelError if dVAE, priors and tokenizer of a model have other sizes."""
    name, px, dvae = model.name, model.px, model.dvae
    if px < 1 or px % dvae.factor:
        raise ModelError(f"model {name!r}: px is {px}, but must be a multiple of {dvae.factor}")
    for part, prior in priors.items():
        _check_prior(model, part, prior)


def _check_prior(model, part, prior):
    name, dvae = model.name, model.dvae
    if prior.style != STYLES[part]:
        raise ModelError(f"model {name!r}: its {part} has the style {prior.style}")
    if model.tokenizer is None:
        raise ModelError(
            f"model {name!r} has a prior but no tokenizer; give the one it learned with"
        )
    for owner, what, has, needs in (
        ("dVAE", "grid", model.grid, prior.grid),
        ("dVAE", "codes", dvae.codes, prior.codes),
        ("tokenizer", "text vocabulary", model.tokenizer.vocabulary, prior.text_vocabulary),
    ):
        if has != needs:
            raise ModelError(
                f"model {name!r}: the prior was made for {what} {needs}, but the "
                f"{owner} has {has}; they do not belong together"
            )


def check_tensors(what: str, tensors: Tensors, shapes: Shapes) -> None:
    """Raises a ModelError, naming the tensor, unless there are all and of the wanted shapes."""
    wanted = {name: tuple(leaf.shape) for name, leaf in shapes.items()}
    got = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ModelError(
                f"the weights of the {what} do not fit its config: {name} has shape "
                f"{got.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
            )


def check_fingerprints(name: str, has: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises a ModelError if a part is another one than the prior was trained with."""
    reasons = {
        "dvae": f"the dVAE of model {name!r} is damaged or not the one it was trained with",
        "tokenizer": f"the tokenizer of model {name!r} is not the one it was trained with",
        "prior": f"the prior of model {name!r} is damaged",
        "progressive": f"the progressive prior of model {name!r} is damaged",
    }
    for part, reason in reasons.items():
        if part in wanted and part in has and wanted[part] != has[part]:
            raise ModelError(
                f"{reason} (fingerprint {has[part][:12]}, wanted {wanted[part][:12]}); "
                "put the original file back"
            )


def dvae_shapes(config: DVAEConfig) -> Shapes:
    """What the weights of a dVAE look like."""
    picture = jax.ShapeDtypeStruct((1, config.factor, config.factor, 3), jnp.float32)
    return shapes(DVAE(config).init, picture)


def prior_shapes(config: PriorConfig) -> Shapes:
    """What the weights of a prior look like."""
    return shapes(partial(draw_params, config))


def shapes(init: Callable, *inputs: Any) -> Shapes:
    """What is drawn with a key for such inputs; not even the key is made."""
    drawn = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), *inputs)
    return files.flat(drawn.get("params", drawn))
