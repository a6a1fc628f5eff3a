"""dalle-mini and dalle-mega: the names of their tensors, and the sizes in their config.json.

Layers are stacked (FlaxBartDecoderLayers/..., with a first axis) or numbered
(FlaxBartDecoderLayer_0/...); ours are stacked.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.models.seq2seq_prior import Seq2SeqConfig
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.msgpack_file import read_msgpack
from dalle_jax.weights.rules import Rule

_LARGEST_CONFIG = 2**20  # bytes
_NEEDS = {
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "activation_function": "gelu",
    "use_glu": True,
    "use_absolute_position_embeddings": True,
    "use_final_ln_encoder": True,
    "use_final_ln_decoder": True,
    **dict.fromkeys(
        ("scale_embedding", "tie_word_embeddings", "use_bias", "use_head_scale", "force_ln_scale"),
        False,
    ),
    **dict.fromkeys(
        ("use_cosine_attention", "use_swin_position_embeddings", "use_deepnet_scaling"), False
    ),
    "sinkhorn_iters": 1,
}
"""Options of the release that the published models have, and its defaults; others are refused."""


def _norms(theirs: str, ours: str, index: str, *, gain: bool) -> tuple[Rule, ...]:
    parts = ("scale", "bias") if gain else ("bias",)
    return tuple(Rule(f"{theirs}/{part}", f"{ours}/{part}{index}") for part in parts)


def _layers(half: str, parts: tuple[str, ...], theirs: str, index: str) -> tuple[Rule, ...]:
    theirs, ours = f"model/{half}/layers/{theirs}", f"{half}/layers"
    rules: list[Rule] = []
    for i, part in enumerate(parts):
        rules += _norms(f"{theirs}/LayerNorm_{2 * i}", f"{ours}/{part}/norm_in", index, gain=False)
        rules += _norms(
            f"{theirs}/LayerNorm_{2 * i + 1}", f"{ours}/{part}/norm_out", index, gain=True
        )
        for name in ("q", "k", "v", "out"):
            kernel = f"{theirs}/FlaxBartAttention_{i}/{name}_proj/kernel"
            rules.append(Rule(kernel, f"{ours}/{part}/{name}/kernel{index}"))
    for i, name in enumerate(("gate", "value", "out")):
        rules.append(Rule(f"{theirs}/GLU_0/Dense_{i}/kernel", f"{ours}/mlp/{name}/kernel{index}"))
    for i, name in enumerate(("norm_in", "norm_hidden")):
        rules += _norms(f"{theirs}/GLU_0/LayerNorm_{i}", f"{ours}/mlp/{name}", index, gain=False)
    return tuple(rules)


def _half(half: str, parts: tuple[str, ...]) -> tuple[Rule, ...]:
    name = f"FlaxBart{half.capitalize()}Layer"
    return (
        Rule(f"model/{half}/embed_tokens/embedding", f"{half}/token"),
        Rule(f"model/{half}/embed_positions/embedding", f"{half}/position"),
        *_norms(f"model/{half}/layernorm_embedding", f"{half}/norm_in", "", gain=True),
        *_norms(f"model/{half}/final_ln", f"{half}/norm", "", gain=False),
        *_layers(half, parts, f"{name}s", ""),
        *_layers(half, parts, f"{name}_{{i}}", "[{i}]"),
    )


DALLE_MINI = (
    *_half("encoder", ("self",)),
    *_half("decoder", ("self", "cross")),
    Rule("lm_head/kernel", "head/kernel"),
)


def dalle_mini_config(path: Path, *, codes: int = 16384) -> Seq2SeqConfig:
    """Sizes of a prior.

    Args:
      path: its config.json.
      codes: of the codec that it was trained with.
    Raises:
      WeightsError: if config.json is damaged, or says what the published models do not have.
    """
    config = _read(path)
    for name, value in _NEEDS.items():
        if config.get(name, value) != value:
            raise WeightsError(
                f"{path} has {name} {config[name]!r}, but only {value!r} can be imported, as the "
                "published models have it"
            )
    for name in ("attention_heads", "ffn_dim"):
        both = [config.get(f"{half}_{name}") for half in ("encoder", "decoder")]
        if both[0] != both[1]:
            raise WeightsError(f"{path} has {name} {both[0]} and {both[1]}; one number is wanted")
    length = _size(config, "image_length", path)
    if math.isqrt(length) ** 2 != length:
        raise WeightsError(f"{path} has image_length {length}, which is no square")
    return Seq2SeqConfig(
        width=_size(config, "d_model", path),
        heads=_size(config, "decoder_attention_heads", path),
        mlp=_size(config, "decoder_ffn_dim", path),
        encoder_depth=_size(config, "encoder_layers", path),
        decoder_depth=_size(config, "decoder_layers", path),
        text_vocabulary=_size(config, "encoder_vocab_size", path),
        text_slots=_size(config, "max_text_length", path),
        grid=math.isqrt(length),
        codes=codes,
        image_vocabulary=_size(config, "image_vocab_size", path) + 1,
        start_of_image=_size(config, "decoder_start_token_id", path),
    )


def read_dalle_mini(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Tensors of a prior, the first of its files."""
    return read_msgpack(files[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged ({error!r:.100}); fetch it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def _size(config, name, path) -> int:
    size = config.get(name)
    if type(size) is not int or not 0 < size < 2**24:
        raise WeightsError(f"{path} has {name} {size!r}, but a size is wanted")
    return size
