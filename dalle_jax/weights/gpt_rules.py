"""minDALL-E: the names of its prior's tensors, and the sizes that follow from them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.text.char_bpe import CharBPETokenizer
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import MATRIX, Rule, linear, norm
from dalle_jax.weights.state_dict import Tensors, count, read_state_dict, shape_of

HEAD = 64
"""Width of a head in the published model; its file does not say."""

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
    rows, _ = shape_of(tensors, "tok_emb_img.weight", 2)
    if rows != codes:
        raise WeightsError(
            f"its tok_emb_img.weight has {rows} rows, but the codec has {codes} codes; they do "
            "not belong together"
        )
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
