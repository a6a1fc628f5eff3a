"""Published CLIPs: the names of their tensors, and the sizes that follow from them.

openai-clip   TorchScript archive, or a state dict of it; bpe_simple_vocab_16e6.txt.gz
hf-clip       model.safetensors or pytorch_model.bin; merges.txt; config.json for the heads
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors

from dalle_jax.models.clip import CLIPConfig
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import CONV, MATRIX, Rule, linear, norm
from dalle_jax.weights.torch_file import read_torch

Tensors = dict[str, np.ndarray]

HEAD = 64
"""Width of a head in every published CLIP; their files do not say."""


def _openai_layers(theirs: str, ours: str) -> tuple[Rule, ...]:
    theirs, ours = f"{theirs}.resblocks.{{i}}", f"{ours}/layers"
    return (
        *norm(f"{theirs}.ln_1", f"{ours}/attention_norm", "[{i}]"),
        *norm(f"{theirs}.ln_2", f"{ours}/mlp_norm", "[{i}]"),
        Rule(f"{theirs}.attn.in_proj_weight", f"{ours}/qkv/kernel[{{i}}]", MATRIX),
        Rule(f"{theirs}.attn.in_proj_bias", f"{ours}/qkv/bias[{{i}}]"),
        *linear(f"{theirs}.attn.out_proj", f"{ours}/attention_out"),
        *linear(f"{theirs}.mlp.c_fc", f"{ours}/mlp_in"),
        *linear(f"{theirs}.mlp.c_proj", f"{ours}/mlp_out"),
    )


OPENAI = (
    Rule("visual.conv1.weight", "image/patch/kernel", CONV),
    Rule("visual.class_embedding", "image/class"),
    Rule("visual.positional_embedding", "image/position"),
    *norm("visual.ln_pre", "image/first_norm"),
    *_openai_layers("visual.transformer", "image"),
    *norm("visual.ln_post", "image/last_norm"),
    Rule("visual.proj", "image/projection/kernel"),
    Rule("token_embedding.weight", "text/token"),
    Rule("positional_embedding", "text/position"),
    *_openai_layers("transformer", "text"),
    *norm("ln_final", "text/last_norm"),
    Rule("text_projection", "text/projection/kernel"),
    Rule("logit_scale", "log_scale"),
    *map(Rule, ("input_resolution", "context_length", "vocab_size")),
    Rule("{*}attn_mask"),  # TorchScript keeps the causal mask
)


def _hf_layers(theirs: str, ours: str) -> tuple[Rule, ...]:
    theirs, ours = f"{theirs}.encoder.layers.{{i}}", f"{ours}/layers"
    qkv = (
        rule
        for n, name in enumerate("qkv")
        for rule in linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/qkv", f"[{{i}},:,{n}]")
    )
    return (
        *norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm", "[{i}]"),
        *norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm", "[{i}]"),
        *qkv,
        *linear(f"{theirs}.self_attn.out_proj", f"{ours}/attention_out"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}/mlp_in"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}/mlp_out"),
    )


HUGGING_FACE = (
    Rule("vision_model.embeddings.patch_embedding.weight", "image/patch/kernel", CONV),
    Rule("vision_model.embeddings.class_embedding", "image/class"),
    Rule("vision_model.embeddings.position_embedding.weight", "image/position"),
    *norm("vision_model.pre_layrnorm", "image/first_norm"),  # spelt so
    *_hf_layers("vision_model", "image"),
    *norm("vision_model.post_layernorm", "image/last_norm"),
    Rule("visual_projection.weight", "image/projection/kernel", MATRIX),
    Rule("text_model.embeddings.token_embedding.weight", "text/token"),
    Rule("text_model.embeddings.position_embedding.weight", "text/position"),
    *_hf_layers("text_model", "text"),
    *norm("text_model.final_layer_norm", "text/last_norm"),
    Rule("text_projection.weight", "text/projection/kernel", MATRIX),
    Rule("logit_scale", "log_scale"),
    Rule("{*}.position_ids"),
)


def read_openai(files: Sequence[Path]) -> Tensors:
    """Tensors of a TorchScript archive or of its state dict; the program is not run."""
    tensors = read_torch(files[0], shells=True)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)}


def read_hugging_face(files: Sequence[Path]) -> Tensors:
    """Tensors of a safetensors file, or of one by torch.save."""
    if files[0].suffix != ".safetensors":
        return read_torch(files[0])
    try:
        with safetensors.safe_open(files[0], framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{files[0]} is damaged or no safetensors file ({error})") from error


def openai_config(tensors: Mapping[str, np.ndarray], files: Sequence[Path]) -> CLIPConfig:
    """Sizes of a CLIP by its own names."""
    del files
    return _config(
        tensors,
        patch="visual.conv1.weight",
        place="visual.positional_embedding",
        layers=r"{}transformer\.resblocks\.(\d+)\.ln_1\.weight",
        prefixes=(r"visual\.", ""),
        token="token_embedding.weight",
        length="positional_embedding",
        feature="text_projection",
    )


def hugging_face_config(tensors: Mapping[str, np.ndarray], files: Sequence[Path]) -> CLIPConfig:
    """Sizes of a CLIP; config.json, if given, says how many heads there are."""
    sizes = _config(
        tensors,
        patch="vision_model.embeddings.patch_embedding.weight",
        place="vision_model.embeddings.position_embedding.weight",
        layers=r"{}_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight",
        prefixes=("vision", "text"),
        token="text_model.embeddings.token_embedding.weight",
        length="text_model.embeddings.position_embedding.weight",
        feature="text_projection.weight",
        feature_axis=0,
    )
    for file in files:
        if file.suffix == ".json":
            return _with_heads(sizes, file)
    return sizes


def _with_heads(sizes: CLIPConfig, file: Path) -> CLIPConfig:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        parts = {part: config.get(f"{part}_config") or {} for part in ("vision", "text")}
        heads = [part.get("num_attention_heads") for part in parts.values()]
        activations = {part.get("hidden_act", "quick_gelu") for part in parts.values()}
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file} is no config of a CLIP ({error!r:.100})") from error
    if activations != {"quick_gelu"}:
        raise WeightsError(
            f"{file} says hidden_act {sorted(map(str, activations))}, but only CLIPs with "
            "'quick_gelu' can be imported, as OpenAI's are"
        )
    changes = dict(zip(("image_heads", "text_heads"), heads, strict=True))
    known = {name: number for name, number in changes.items() if type(number) is int}
    return CLIPConfig(**(vars(sizes) | known))


def _config(
    tensors, *, patch, place, layers, prefixes, token, length, feature, feature_axis=1
) -> CLIPConfig:
    wanted = {patch: 4, place: 2, token: 2, length: 2, feature: 2}
    for name, axes in wanted.items():
        if name not in tensors or tensors[name].ndim != axes:
            has = list(tensors[name].shape) if name in tensors else "missing"
            raise WeightsError(
                f"its tensor {name} is {has}, wanted {axes} axes; is it a CLIP with a vision "
                "transformer, of this source?"
            )
    image_width, _, side, _ = tensors[patch].shape
    grid = round(max(len(tensors[place]) - 1, 0) ** 0.5)
    vocabulary, text_width = tensors[token].shape
    depths = [
        sum(re.fullmatch(layers.format(prefix), name) is not None for name in tensors)
        for prefix in prefixes
    ]
    return CLIPConfig(
        px=grid * side,
        patch=side,
        image_width=image_width,
        image_depth=depths[0],
        image_heads=max(image_width // HEAD, 1),
        text_width=text_width,
        text_depth=depths[1],
        text_heads=max(text_width // HEAD, 1),
        text_vocabulary=vocabulary - 2,
        text_length=len(tensors[length]),
        features=tensors[feature].shape[feature_axis],
    )
