"""Our codecs in the layouts of others, so that their code can use what is trained here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dalle_jax.models.codec import TITLES, CodecConfig, kind
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights.codec_rules import DVAE, TAMING
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import to_theirs
from dalle_jax.weights.torch_write import write_torch

Layout = Literal["openai-dvae", "taming-vqgan"]


def write_codec(
    layout: Layout, config: CodecConfig, arrays: Mapping[str, np.ndarray], out: Path
) -> list[Path]:
    """Writes a codec for `torch.load`.

    Args:
      layout: of whom. A dVAE becomes two state dicts, for `load_state_dict` of the Encoder and
        Decoder of the package `dall_e`; a VQ-GAN a checkpoint with "state_dict", as taming's are.
      config: of the codec.
      arrays: its weights, by our names.
      out: the file; a dVAE's decoder goes beside it, with "-decoder" in its name.
    Returns:
      The files.
    Raises:
      WeightsError: if that layout has no place for this codec.
    """
    check_layout(layout, config)
    if layout == "taming-vqgan":
        by_logits = config.quantizer == "logits"
        table = "quantize.embed.weight" if by_logits else "quantize.embedding.weight"
        # two rules lead to the table, by two names of theirs
        other = {"quantize.embed.weight", "quantize.embedding.weight"} - {table}
        rules = [rule for rule in TAMING if rule.theirs not in other]
        write_torch(out, {"state_dict": to_theirs(arrays, rules)})
        return [out]
    tensors = to_theirs(arrays, DVAE)
    files = [out, out.with_stem(f"{out.stem}-decoder")]
    for half, file in zip(("encoder", "decoder"), files, strict=True):
        part = {k.removeprefix(f"{half}."): v for k, v in tensors.items() if k.startswith(half)}
        write_torch(file, part)
    return files


def check_layout(layout: Layout, config: CodecConfig) -> None:
    """Raises a WeightsError if others' code could not run this codec."""
    if layout == "openai-dvae" and isinstance(config, DVAEConfig):
        gain = (config.groups * config.blocks_per_group) ** -2
        needs = {
            f"4 groups, and not {config.groups}": config.groups == 4,
            f"a residual_gain of {gain}, and not {config.gain}": config.gain == gain,
        }
    elif layout == "taming-vqgan" and isinstance(config, VQGANConfig):
        narrow = config.width * min(config.multipliers)
        needs = {
            f"a patch of 1, and not {config.patch}": config.patch == 1,
            f"at least 128 channels everywhere, and not {narrow}": narrow >= 128,
            "a quantizer by distance or logits, and not by cosine": config.quantizer != "cosine",
            "pixels in [-1, 1], and not in [0, 1]": not config.unit_pixels,
            "a decoder without wavelets": not config.wavelets,
        }
    else:
        raise WeightsError(f"the layout {layout} is not for this model's {TITLES[kind(config)]}")
    for need, met in needs.items():
        if not met:
            raise WeightsError(f"the layout {layout} needs {need}: others' code has it built in")
