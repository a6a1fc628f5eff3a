"""minDALL-E and ruDALL-E: names of their priors' tensors, and the sizes that follow from them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dalle_jax.models.gpt_prior import GPTConfig, Variant
from dalle_jax.models.masks import attention_mask, window_mask
from dalle_jax.text.char_bpe import CharBPETokenizer
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import MATRIX, Rule, linear, norm
from dalle_jax.weights.state_dict import Tensors, count, read_state_dict, shape_of

HEAD = 64
"""Width of a head in minDALL-E; its file does not say. Nor do ruDALL-E's."""
MALEVICH_HEAD = 128
KANDINSKY_WIDTH = 3840  # its heads are as wide as minDALL-E's

MINDALLE = (
    *(
        Rule(f"{table}_emb_{theirs}.weight", f"embed/{ours}")
        for table, theirs, ours in (
            ("tok", "txt", "text"),
            ("pos", "txt", "slot"),
            ("tok", "img", "code"),
            ("pos", "img", "cell"),
        )
    ),
    *norm("blocks.{i}.ln1", "layers/attention_norm", "[{i}]"),
    *(
        rule
        for n, name in enumerate(("query", "key", "value"))
        for rule in linear(f"blocks.{{i}}.attn.{name}", "layers/qkv", f"[{{i}},:,{n}]")
    ),
    *linear("blocks.{i}.attn.proj", "layers/attention_out"),
    *norm("blocks.{i}.ln2", "layers/mlp_norm", "[{i}]"),
    *linear("blocks.{i}.mlp.0", "layers/mlp_in"),
    *linear("blocks.{i}.mlp.2", "layers/mlp_out"),
    *norm("ln_f", "head/norm"),
    Rule("head_txt.weight", "head/text/kernel", MATRIX),
    Rule("head_img.weight", "head/image/kernel", MATRIX),
)

_LAYER = "transformer.layers.{i}"
MALEVICH = (
    *(
        Rule(f"{theirs}_embeddings.weight", f"embed/{ours}")
        for theirs, ours in (
            ("text", "text"),
            ("text_pos", "slot"),
            ("image", "code"),
            ("image_row", "row"),
            ("image_col", "column"),
        )
    ),
    *norm(f"{_LAYER}.input_layernorm", "layers/attention_norm", "[{i}]"),
    *linear(f"{_LAYER}.attention.query_key_value", "layers/qkv"),
    *linear(f"{_LAYER}.attention.dense", "layers/attention_out"),
    *norm(f"{_LAYER}.before_first_addition_layernorm", "layers/attention_out_norm", "[{i}]"),
    *norm(f"{_LAYER}.post_attention_layernorm", "layers/mlp_norm", "[{i}]"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", "layers/mlp_in"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", "layers/mlp_out"),
    *norm(f"{_LAYER}.before_second_addition_layernorm", "layers/mlp_out_norm", "[{i}]"),
    *norm("transformer.final_layernorm", "head/norm"),
    *norm("to_logits.0", "head/second_norm"),
    *linear("to_logits.1.text", "head/text", ""),
    *linear("to_logits.1.image", "head/image", ""),
    Rule("transformer.{*}_mask"),
)


def read_mindalle(files: Sequence[Path]) -> Tensors:
    """Tensors of a prior, the first of its files."""
    return read_state_dict(files[0])


def mindalle_config(
    tensors: Mapping[str, np.ndarray], files: Sequence[Path], *, codes: int
) -> GPTConfig:
    """Sizes of a prior.

    Args:
      tensors: of its checkpoint.
      files: the checkpoint and the tokenizer's, which say what the pad is.
      codes: of the codec that it was trained with.
    Raises:
      WeightsError: if they are not those of this source.
    """
    vocabulary, width = shape_of(tensors, "tok_emb_txt.weight", 2)
    cells, _ = shape_of(tensors, "pos_emb_img.weight", 2)
    if math.isqrt(cells) ** 2 != cells:
        raise WeightsError(f"its pos_emb_img.weight has {cells} rows, which is no square")
    _check_codes(tensors, "tok_emb_img.weight", codes)
    if width % HEAD:
        raise WeightsError(f"its width is {width}, but must be a multiple of {HEAD}")
    return GPTConfig(
        width=width,
        depth=count(tensors, r"blocks\.(\d+)\.ln1\.weight"),
        heads=width // HEAD,
        text_vocabulary=vocabulary,
        text_slots=shape_of(tensors, "pos_emb_txt.weight", 2)[0],
        grid=math.isqrt(cells),
        codes=codes,
        pad=CharBPETokenizer.from_files(*files[1:], rows=vocabulary).pad,
    )


def read_malevich(files: Sequence[Path]) -> Tensors:
    """Tensors of a prior, the first of its files, with the head in two parts, text and image."""
    tensors = read_state_dict(files[0])
    rows, _ = shape_of(tensors, "text_embeddings.weight", 2)
    for name, axes in (("weight", 2), ("bias", 1)):
        shape_of(tensors, f"to_logits.1.{name}", axes)
        whole = tensors.pop(f"to_logits.1.{name}")
        tensors |= {f"to_logits.1.text.{name}": whole[:rows]}
        tensors |= {f"to_logits.1.image.{name}": whole[rows:]}
    return tensors


def malevich_config(
    tensors: Mapping[str, np.ndarray], files: Sequence[Path], *, codes: int, variant: Variant
) -> GPTConfig:
    """Sizes of a prior of ruDALL-E.

    Args:
      tensors: of its checkpoint, which may hold the masks that it was trained with.
      files: the checkpoint and the tokenizer's.
      codes: of the codec that it was trained with.
      variant: v2 or v3, which its sizes do not say.
    Raises:
      WeightsError: if they are not those of this source.
    """
    del files
    rows, width = shape_of(tensors, "text_embeddings.weight", 2)
    slots = shape_of(tensors, "text_pos_embeddings.weight", 2)[0] - 1
    grid, _ = shape_of(tensors, "image_row_embeddings.weight", 2)
    _check_codes(tensors, "image_embeddings.weight", codes)
    head = HEAD if width == KANDINSKY_WIDTH else MALEVICH_HEAD
    if width % head:
        raise WeightsError(f"its width is {width}, but must be a multiple of {head}")
    _check_mask(tensors, slots, grid, variant)
    return GPTConfig(
        variant=variant,
        width=width,
        depth=count(tensors, r"transformer\.layers\.(\d+)\.input_layernorm\.weight"),
        heads=width // head,
        text_vocabulary=rows - slots,
        text_slots=slots,
        grid=grid,
        codes=codes,
    )


def _check_codes(tensors, table, codes):
    rows, _ = shape_of(tensors, table, 2)
    if rows != codes:
        raise WeightsError(
            f"its {table} has {rows} rows, but the codec has {codes} codes; they do not belong "
            "together"
        )


def _check_mask(tensors, slots, grid, variant):
    """Refuses a file whose own mask is that of the other version."""
    mask = tensors.get("transformer.conv_mask")
    if mask is None or mask.shape != (slots + grid**2,) * 2:
        return
    (other,) = {"malevich-v2", "malevich-v3"} - {variant}
    of = {}
    for version in (variant, other):
        of[version] = attention_mask("dense", text_length=slots, grid=grid)
        of[version][slots:, slots:] = window_mask(grid=grid, wraps=version == "malevich-v2")
    if np.array_equal(mask, of[other]) and not np.array_equal(*of.values()):
        raise WeightsError(f"its masks are those of {other}; import it as that source")
