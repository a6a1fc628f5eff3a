"""Published codecs: the names of their tensors, and the sizes that follow from them.

openai-dvae       encoder.pkl and decoder.pkl: pickled modules, whose code is not run
taming            Lightning checkpoints of VQ-GANs, by nearest code or (Gumbel) by logits
dalle-mini-vqgan  the network of taming in flax's msgpack, for pixels in [0, 1]
llamagen-vq       {"model": ...}; the decoder's groups are numbered coarse to fine
maskgit-vqgan     a plain state dict
malevich-dwt      the network of taming by logits; its decoder ends in wavelets
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGANConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.msgpack_file import read_msgpack
from dalle_jax.weights.rules import CONV, Rule, norm
from dalle_jax.weights.state_dict import Tensors, count, read_state_dict, shape_of

_HALVES = (("encoder", "down"), ("decoder", "up"))


def _conv(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}/kernel", CONV), Rule(f"{theirs}.bias", f"{ours}/bias")


def _block(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{theirs}.norm1", f"{ours}/norm1"),
        *_conv(f"{theirs}.conv1", f"{ours}/conv1"),
        *norm(f"{theirs}.norm2", f"{ours}/norm2"),
        *_conv(f"{theirs}.conv2", f"{ours}/conv2"),
        *_conv(f"{theirs}.nin_shortcut", f"{ours}/nin_shortcut"),
    )


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    parts = (
        rule for x in ("q", "k", "v", "proj_out") for rule in _conv(f"{theirs}.{x}", f"{ours}/{x}")
    )
    return (*norm(f"{theirs}.norm", f"{ours}/norm"), *parts)


def _ends(half: str) -> tuple[Rule, ...]:
    return (
        *_conv(f"{half}.conv_in", f"{half}/conv_in"),
        *norm(f"{half}.norm_out", f"{half}/norm_out"),
        *_conv(f"{half}.conv_out", f"{half}/conv_out"),
    )


def _dvae_conv(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.w", f"{ours}/kernel", CONV), Rule(f"{theirs}.b", f"{ours}/bias")


DVAE = tuple(
    rule
    for half, _ in _HALVES
    for theirs, ours in (
        ("input", "input"),
        ("output.conv", "output"),
        ("group_{i}.block_{j}.id_path", "group_{i}_block_{j}/id_path"),
        *(
            (f"group_{{i}}.block_{{j}}.res_path.conv_{n}", f"group_{{i}}_block_{{j}}/conv_{n}")
            for n in range(1, 5)
        ),
    )
    for rule in _dvae_conv(f"{half}.blocks.{theirs}", f"{half}/{ours}")
)

_CODEBOOK = (
    *_conv("quant_conv", "quant_conv"),
    *_conv("post_quant_conv", "post_quant_conv"),
    Rule("quantize.embedding.weight", "quantize/embedding"),
)

TAMING = (
    *(
        rule
        for half, group in _HALVES
        for rule in (
            *_ends(half),
            *_block(f"{half}.{group}.{{i}}.block.{{j}}", f"{half}/{group}_{{i}}/block_{{j}}"),
            *_attention(f"{half}.{group}.{{i}}.attn.{{j}}", f"{half}/{group}_{{i}}/attn_{{j}}"),
            *_block(f"{half}.mid.block_{{j}}", f"{half}/mid/block_{{j}}"),
            *_attention(f"{half}.mid.attn_{{j}}", f"{half}/mid/attn_{{j}}"),
        )
    ),
    *_conv("encoder.down.{i}.downsample.conv", "encoder/down_{i}/downsample/conv"),
    *_conv("decoder.up.{i}.upsample.conv", "decoder/up_{i}/upsample/conv"),
    *_CODEBOOK,
    Rule("quantize.embed.weight", "quantize/embedding"),
    *_conv("quantize.proj", "quantize/proj"),
    Rule("loss.{*}"),
)

WAVELETS = (*TAMING, Rule("decoder.idwt.{*}"))

LLAMAGEN = (
    *(
        rule
        for half, group in _HALVES
        for theirs, ours in ((f"{half}.conv_blocks.{{i}}", f"{half}/{group}_{{i}}"),)
        for rule in (
            *_ends(half),
            *_block(f"{theirs}.res.{{j}}", f"{ours}/block_{{j}}"),
            *_attention(f"{theirs}.attn.{{j}}", f"{ours}/attn_{{j}}"),
            *_block(f"{half}.mid.0", f"{half}/mid/block_1"),
            *_attention(f"{half}.mid.1", f"{half}/mid/attn_1"),
            *_block(f"{half}.mid.2", f"{half}/mid/block_2"),
        )
    ),
    *_conv("encoder.conv_blocks.{i}.downsample.conv", "encoder/down_{i}/downsample/conv"),
    *_conv("decoder.conv_blocks.{i}.upsample.conv", "decoder/up_{i}/upsample/conv"),
    *_CODEBOOK,
    Rule("quantize.codebook_used"),
)

# the names of flax are ours, but for the table
DALLE_MINI = (
    Rule("quantize/embedding/embedding", "quantize/embedding"),
    *(
        Rule(rule.ours, rule.ours)
        for rule in TAMING
        if rule.ours and not rule.ours.startswith("quantize/")
    ),
)

MASKGIT = (
    *(
        rule
        for half, group in _HALVES
        for rule in (
            *_ends(half),
            *_block(f"{half}.{group}.{{i}}.block.{{j}}", f"{half}/{group}_{{i}}/block_{{j}}"),
            *_block(f"{half}.mid.{{j}}", f"{half}/mid/block_{{j}}"),
        )
    ),
    *_conv("decoder.up.{i}.upsample_conv", "decoder/up_{i}/upsample_conv"),
    Rule("quantize.embedding.weight", "embedding"),
)


def read_dvae(files: Sequence[Path]) -> Tensors:
    """Tensors of both halves; the two files have the same names in them."""
    return {
        f"{half}.{name}": tensor
        for (half, _), file in zip(_HALVES, files, strict=True)
        for name, tensor in read_state_dict(file).items()
    }


def read_taming(files: Sequence[Path]) -> Tensors:
    """Tensors of a VQ-GAN, which may stand below another model's name for it."""
    (file,) = files
    tensors = read_state_dict(file)
    prefix = "model." if "model.encoder.conv_in.weight" in tensors else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_wavelets(files: Sequence[Path]) -> Tensors:
    """Tensors of ruDALL-E's VQ-GAN with wavelets, by taming's names.

    It holds `post_quant_conv` twice, and uses the one in its decoder.
    """
    tensors = read_taming(files)
    inner = {name for name in tensors if name.startswith(("decoder.decoder.", "decoder.post_"))}
    renamed = {name.removeprefix("decoder."): tensors.pop(name) for name in sorted(inner)}
    return tensors | renamed


def read_llamagen(files: Sequence[Path]) -> Tensors:
    """Tensors of a VQ-GAN, its decoder's groups numbered fine to coarse as the encoder's are."""
    (file,) = files
    tensors = read_state_dict(file)
    last = count(tensors, r"decoder\.conv_blocks\.(\d+)\..*") - 1

    def numbered(name):
        head, _, rest = name.removeprefix("decoder.conv_blocks.").partition(".")
        return f"decoder.conv_blocks.{last - int(head)}.{rest}"

    return {
        numbered(name) if re.match(r"decoder\.conv_blocks\.\d+\.", name) else name: tensor
        for name, tensor in tensors.items()
    }


def read_maskgit(files: Sequence[Path]) -> Tensors:
    """Tensors of MaskGIT's VQ-GAN."""
    (file,) = files
    return read_state_dict(file)


def read_dalle_mini(files: Sequence[Path]) -> Tensors:
    """Tensors of a VQ-GAN in a msgpack file."""
    (file,) = files
    return read_msgpack(file)


def dvae_config(tensors: Mapping[str, np.ndarray]) -> DVAEConfig:
    """Sizes of a dVAE."""
    code_width, codes, *_ = shape_of(tensors, "decoder.blocks.input.w", 4)
    return DVAEConfig(
        width=shape_of(tensors, "encoder.blocks.input.w", 4)[0],
        groups=count(tensors, r"encoder\.blocks\.group_(\d+)\..*", first=1),
        blocks_per_group=count(tensors, r"encoder\.blocks\.group_1\.block_(\d+)\..*", first=1),
        codes=codes,
        code_width=code_width,
    )


def taming_config(tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
    """Sizes of a VQ-GAN; codes are chosen by logits where there is a projection to them."""
    by_logits = "quantize.proj.weight" in tensors
    return _vqgan_config(
        tensors,
        _TAMING,
        table="quantize.embed.weight" if by_logits else "quantize.embedding.weight",
        quantizer="logits" if by_logits else "nearest",
    )


def wavelets_config(tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
    """Sizes of a VQ-GAN that ends in wavelets."""
    return replace(taming_config(tensors), wavelets=True)


def llamagen_config(tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
    """Sizes of a VQ-GAN whose codes have length 1."""
    table = "quantize.embedding.weight"
    return _vqgan_config(tensors, _LLAMAGEN, table=table, quantizer="cosine")


def dalle_mini_config(tensors: Mapping[str, np.ndarray]) -> VQGANConfig:
    """Sizes of a VQ-GAN whose pixels lie in [0, 1]."""
    table = "quantize/embedding/embedding"
    return _vqgan_config(tensors, _FLAX, table=table, unit_pixels=True)


def maskgit_config(tensors: Mapping[str, np.ndarray]) -> MaskGITVQGANConfig:
    """Sizes of MaskGIT's VQ-GAN."""
    width, multipliers, blocks = _groups(tensors, _TAMING)
    codes, code_width = shape_of(tensors, "quantize.embedding.weight", 2)
    return MaskGITVQGANConfig(
        width=width,
        multipliers=multipliers,
        blocks_per_group=blocks,
        codes=codes,
        code_width=code_width,
    )


class _Names(NamedTuple):
    """Where a layout's sizes stand: names of tensors, numbered by group and block."""

    conv1: str
    attention: str
    ends: str
    """First and last convolution of the encoder."""
    features: int
    """Axis of a kernel that holds what it makes."""


_TAMING = _Names(
    "encoder.down.{}.block.{}.conv1.weight",
    "encoder.down.{}.attn.0.norm.weight",
    "encoder.conv_{}.weight",
    0,
)
_LLAMAGEN = _TAMING._replace(
    conv1="encoder.conv_blocks.{}.res.{}.conv1.weight",
    attention="encoder.conv_blocks.{}.attn.0.norm.weight",
)
_FLAX = _Names(
    "encoder/down_{}/block_{}/conv1/kernel",
    "encoder/down_{}/attn_0/norm/scale",
    "encoder/conv_{}/kernel",
    3,
)


def _vqgan_config(tensors, names, *, table, **options):
    width, multipliers, blocks = _groups(tensors, names)
    codes, code_width = shape_of(tensors, table, 2)
    return VQGANConfig(
        width=width,
        multipliers=multipliers,
        blocks_per_group=blocks,
        attention=tuple(
            2**i for i in range(len(multipliers)) if names.attention.format(i) in tensors
        ),
        z_width=shape_of(tensors, names.ends.format("out"), 4)[names.features],
        codes=codes,
        code_width=code_width,
        **options,
    )


def _groups(tensors, names):
    """Width, multipliers of it, and blocks of a group."""
    width = shape_of(tensors, names.ends.format("in"), 4)[names.features]
    pattern = re.escape(names.conv1).replace(r"\{\}", "{}")
    groups = count(tensors, pattern.format(r"(\d+)", r"\d+"))
    sides = [shape_of(tensors, names.conv1.format(i, 0), 4)[names.features] for i in range(groups)]
    if not width or any(side % width for side in sides):
        raise WeightsError(f"its groups have {sides} channels, no multiples of the first {width}")
    blocks = count(tensors, pattern.format(0, r"(\d+)"))
    return width, tuple(side // width for side in sides), blocks
