"""Checks that the parts of a model belong to each other.

Source: ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dalle_jax.generate import tensor_file
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.sampling import Decoder
from dalle_jax.generate.tensor_file import Tensors
from dalle_jax.models import autoregressive_prior, gpt_prior, progressive_prior, seq2seq_prior
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig

DECODERS: dict[str, tuple[Decoder, ...]] = {
    "progressive": ("progressive",),
    "prior": ("autoregressive", "jacobi"),
    "seq2seq": ("autoregressive",),
    "gpt": ("autoregressive",),
}
"""What the option `decoder` can be for each prior, the usual ones first."""
CONFIGS = {
    "prior": PriorConfig,
    "progressive": ProgressiveConfig,
    "seq2seq": Seq2SeqConfig,
    "gpt": GPTConfig,
}
"""Sizes of each."""
AnyPriorConfig = PriorConfig | ProgressiveConfig | Seq2SeqConfig | GPTConfig
_NETWORKS = {
    "prior": autoregressive_prior,
    "progressive": progressive_prior,
    "seq2seq": seq2seq_prior,
    "gpt": gpt_prior,
}

Shapes = dict[str, jax.ShapeDtypeStruct]  # by the names that weights are stored by


def check_parts(model: Any, priors: dict[str, AnyPriorConfig]) -> None:
    """Raises a ModelError if codec, priors and tokenizer of a model have other sizes."""
    name, px, factor = model.name, model.px, model.codec.factor
    if px < 1 or px % factor:
        raise ModelError(f"model {name!r}: px is {px}, but must be a multiple of {factor}")
    for part, prior in priors.items():
        _check_prior(model, part, prior)


def _check_prior(model, part, prior):
    name, owner_of_codes = model.name, codecs.TITLES[model.kind]
    if not isinstance(prior, CONFIGS[part]):
        raise ModelError(
            f"model {name!r}: its {part} has a {type(prior).__name__}, but needs a "
            f"{CONFIGS[part].__name__}"
        )
    if model.tokenizer is None:
        raise ModelError(
            f"model {name!r} has a prior but no tokenizer; give the one it learned with"
        )
    for owner, what, has, needs in (
        (owner_of_codes, "grid", model.grid, prior.grid),
        (owner_of_codes, "codes", model.codec.codes, prior.codes),
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
        kind: f"the {title} of model {name!r} is damaged or not the one it was trained with"
        for kind, title in codecs.TITLES.items()
    } | {
        "tokenizer": f"the tokenizer of model {name!r} is not the one it was trained with",
        "prior": f"the prior of model {name!r} is damaged",
        "progressive": f"the progressive prior of model {name!r} is damaged",
        "seq2seq": f"the prior of model {name!r} is damaged",
        "gpt": f"the prior of model {name!r} is damaged",
    }
    for part, reason in reasons.items():
        if part in wanted and part in has and wanted[part] != has[part]:
            raise ModelError(
                f"{reason} (fingerprint {has[part][:12]}, wanted {wanted[part][:12]}); "
                "put the original file back"
            )


def codec_shapes(config: CodecConfig) -> Shapes:
    """Shapes of the weights of a dVAE or VQ-GAN."""
    return shapes(partial(codecs.init_params, config))


def prior_shapes(config: AnyPriorConfig) -> Shapes:
    """Shapes of the weights of a prior."""
    (part,) = (part for part, kind in CONFIGS.items() if isinstance(config, kind))
    return shapes(partial(_NETWORKS[part].init_params, config))


def shapes(init: Callable, *inputs: Any) -> Shapes:
    """Shapes of the parameters that `init` returns; nothing is computed."""
    params = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), *inputs)
    return tensor_file.flatten_params(params.get("params", params))
