"""What can be imported, and where it is published. Files are the user's: nothing is downloaded.

A new source is an entry of `SOURCES`: how its files are read, what sizes follow, and the table of
its names.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from dalle_jax.models import clip as clip_network
from dalle_jax.models import codec as codecs
from dalle_jax.models import gpt_prior, seq2seq_prior
from dalle_jax.text.bart_bpe import BARTTokenizer
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.char_bpe import CharBPETokenizer
from dalle_jax.text.clip_bpe import CLIPTokenizer
from dalle_jax.text.yttm_bpe import YTTMTokenizer
from dalle_jax.weights import clip_rules, codec_rules, gpt_rules, seq2seq_rules
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import Rule, Shape, to_ours

MIT = "MIT"
APACHE = "Apache-2.0"
_RUDALLE = "https://huggingface.co/sberbank-ai/rudalle"
_BPE_MODEL = "https://huggingface.co/shonenkov/rudalle-utils/tree/main (bpe.model)"
_MINDALLE = "https://github.com/kakaobrain/minDALL-E (dalle/models/__init__.py names the address)"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A family of published weights."""

    title: str
    kind: Literal["codec", "clip", "prior"]
    files: tuple[str, ...]
    """What to give, in this order."""
    addresses: tuple[str, ...]
    """Where they are published."""
    licence: str
    note: str
    """Size, and what is worth knowing."""
    read: Callable[[Sequence[Path]], dict[str, np.ndarray]]
    config: Callable[..., Any]
    """Sizes: of a codec by its tensors, else by files too, of a prior with the codec's `codes`."""
    rules: tuple[Rule, ...]
    tokenizer: Callable[[Sequence[Path], Any], Tokenizer] | None = None
    """That of a CLIP or prior, by its files and sizes."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of files for which their publisher says it."""
    px: int | None = None
    """Side of images that it was trained on, in pixels; of a CLIP its tensors say it."""


def _dalle_mini_config(tensors, files, *, codes):
    del tensors  # whose sizes config.json says
    return seq2seq_rules.dalle_mini_config(files[1], codes=codes)


def _malevich(variant, **options):
    """A prior of ruDALL-E."""
    return Source(
        kind="prior",
        licence="see its page; ruDALL-E's code is under Apache-2.0",
        note=(
            "1.3B parameters, 2.6 to 5.2 GB; needs its VQ-GAN as --codec: malevich-vqgan for "
            "images of 256 px, malevich-dwt for 512. Write captions in Russian"
        ),
        read=gpt_rules.read_malevich,
        config=partial(gpt_rules.malevich_config, variant=variant),
        rules=gpt_rules.MALEVICH,
        tokenizer=lambda files, config: YTTMTokenizer.from_file(
            files[1], rows=config.text_vocabulary
        ),
        **options,
    )


SOURCES: dict[str, Source] = {
    "openai-dvae": Source(
        title="dVAE of DALL-E (OpenAI 2021), f = 8, 8,192 codes",
        kind="codec",
        files=("encoder.pkl", "decoder.pkl"),
        addresses=(
            "https://cdn.openai.com/dall-e/encoder.pkl",
            "https://cdn.openai.com/dall-e/decoder.pkl",
        ),
        licence="Modified MIT (github.com/openai/DALL-E)",
        note="97.6M parameters, 390 MB",
        read=codec_rules.read_dvae,
        config=codec_rules.dvae_config,
        rules=codec_rules.DVAE,
        px=256,
    ),
    "taming-vqgan": Source(
        title="VQ-GAN (Esser et al. 2021): f16 with 1,024 or 16,384 codes, Gumbel f8 with 8,192",
        kind="codec",
        files=("last.ckpt",),
        addresses=("https://github.com/CompVis/taming-transformers#overview-of-pretrained-models",),
        licence=MIT,
        note="72 to 77M parameters; the checkpoint also holds its discriminator, about 1 GB",
        read=codec_rules.read_taming,
        config=codec_rules.taming_config,
        rules=codec_rules.TAMING,
        px=256,
    ),
    "dalle-mini-vqgan": Source(
        title="VQ-GAN of dalle-mini and dalle-mega (Dayma et al. 2021), f = 16, 16,384 codes",
        kind="codec",
        files=("flax_model.msgpack",),
        addresses=("https://huggingface.co/dalle-mini/vqgan_imagenet_f16_16384/tree/main",),
        licence="see its page; the network is taming's, under MIT",
        note="76M parameters, 304 MB; the same network as taming's, for pixels in [0, 1]",
        read=codec_rules.read_dalle_mini,
        config=codec_rules.dalle_mini_config,
        rules=codec_rules.DALLE_MINI,
        px=256,
    ),
    "llamagen-vq": Source(
        title="VQ-16 and VQ-8 of LlamaGen (Sun et al. 2024), 16,384 codes of length 1",
        kind="codec",
        files=("vq_ds16_c2i.pt",),
        addresses=("https://huggingface.co/FoundationVision/LlamaGen/tree/main",),
        licence=MIT,
        note="72M parameters, 288 MB",
        read=codec_rules.read_llamagen,
        config=codec_rules.llamagen_config,
        rules=codec_rules.LLAMAGEN,
        px=256,
    ),
    "maskgit-vqgan": Source(
        title="VQ-GAN of MaskGIT (Chang et al. 2022), f = 16, 1,024 codes",
        kind="codec",
        files=("maskgit-vqgan-imagenet-f16-256.bin",),
        addresses=("https://huggingface.co/fun-research/TiTok/tree/main",),
        licence=APACHE,
        note="54.5M parameters, 218 MB",
        read=codec_rules.read_maskgit,
        config=codec_rules.maskgit_config,
        rules=codec_rules.MASKGIT,
        px=256,
    ),
    "dalle-mini": Source(
        title="DALL-E mini and mega (Dayma et al. 2021), captions to codes",
        kind="prior",
        files=("flax_model.msgpack", "config.json", "vocab.json", "merges.txt"),
        addresses=(
            "https://huggingface.co/dalle-mini/dalle-mini/tree/main",
            "https://huggingface.co/dalle-mini/dalle-mega/tree/main",
        ),
        licence=APACHE,
        note="438M (mini) and 2.6B (mega) parameters; needs its VQ-GAN, imported, as --codec",
        read=seq2seq_rules.read_dalle_mini,
        config=_dalle_mini_config,
        rules=seq2seq_rules.DALLE_MINI,
        tokenizer=lambda files, config: BARTTokenizer.from_files(
            *files[2:], rows=config.text_vocabulary
        ),
    ),
    "mindalle-vqgan": Source(
        title="VQ-GAN of minDALL-E (Kim et al. 2021), f = 16, 16,384 codes",
        kind="codec",
        files=("stage1_last.ckpt",),
        addresses=(_MINDALLE,),
        licence="see its page; the network is taming's, under MIT",
        note="76M parameters, 304 MB; the same network as taming's; in 1.3B.tar.gz",
        read=codec_rules.read_taming,
        config=codec_rules.taming_config,
        rules=codec_rules.TAMING,
        px=256,
    ),
    "mindalle": Source(
        title="minDALL-E (Kim et al. 2021), captions to codes",
        kind="prior",
        files=("stage2_last.ckpt", "bpe-16k-vocab.json", "bpe-16k-merges.txt"),
        addresses=(_MINDALLE,),
        licence="CC-BY-NC-SA-4.0",
        note="1.3B parameters, 5.2 GB, in 1.3B.tar.gz; needs its VQ-GAN, imported, as --codec",
        read=gpt_rules.read_mindalle,
        config=gpt_rules.mindalle_config,
        rules=gpt_rules.MINDALLE,
        tokenizer=lambda files, config: CharBPETokenizer.from_files(
            *files[1:], rows=config.text_vocabulary
        ),
    ),
    "malevich-vqgan": Source(
        title="VQ-GAN of ruDALL-E (2021), f = 8, 8,192 codes",
        kind="codec",
        files=("vqgan.gumbelf8-sber.model.ckpt",),
        addresses=(f"{_RUDALLE}-utils/tree/main",),
        licence="see its page; the network is taming's, under MIT",
        note="69M parameters; the same network as taming's Gumbel f8, for images of 256 px",
        read=codec_rules.read_taming,
        config=codec_rules.taming_config,
        rules=codec_rules.TAMING,
        px=256,
    ),
    "malevich-dwt": Source(
        title="VQ-GAN of ruDALL-E whose decoder ends in wavelets (2021), 8,192 codes",
        kind="codec",
        files=("vqgan.gumbelf8-sber-dwt.model.ckpt",),
        addresses=(f"{_RUDALLE}-utils/tree/main",),
        licence="see its page; ruDALL-E's code is under Apache-2.0",
        note="69M parameters; the codes of malevich-vqgan, for images of 512 px",
        read=codec_rules.read_wavelets,
        config=codec_rules.wavelets_config,
        rules=codec_rules.WAVELETS,
        px=512,
    ),
    "malevich": _malevich(
        "malevich-v3",
        title="ruDALL-E Malevich v3 (2022), captions in Russian to codes",
        files=("pytorch_model_v3.bin", "bpe.model"),
        addresses=(f"{_RUDALLE}-Malevich/tree/main", _BPE_MODEL),
    ),
    "malevich-v2": _malevich(
        "malevich-v2",
        title="ruDALL-E Malevich v2 and Emojich (2021), captions in Russian to codes",
        files=("pytorch_model_v2.bin (Emojich: pytorch_model.bin)", "bpe.model"),
        addresses=(
            f"{_RUDALLE}-Malevich/tree/main",
            f"{_RUDALLE}-Emojich/tree/main",
            _BPE_MODEL,
        ),
    ),
    "openai-clip": Source(
        title="CLIP (Radford et al. 2021) with a vision transformer, as OpenAI publishes it",
        kind="clip",
        files=("ViT-B-32.pt", "bpe_simple_vocab_16e6.txt.gz"),
        addresses=("https://github.com/openai/CLIP (clip/clip.py names each file's address)",),
        licence="MIT; the model card asks not to deploy it untested",
        note="ViT-B/32: 151M parameters, 338 MB; the address of each file holds its sha256",
        sha256={"ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"},
        read=clip_rules.read_openai,
        config=clip_rules.openai_config,
        rules=clip_rules.OPENAI,
        tokenizer=lambda files, _: CLIPTokenizer.from_merges(files[1]),
    ),
    "hf-clip": Source(
        title="CLIP with a vision transformer, as Hugging Face's transformers keep it",
        kind="clip",
        files=("model.safetensors or pytorch_model.bin", "merges.txt", "config.json (optional)"),
        addresses=("https://huggingface.co/openai/clip-vit-base-patch32/tree/main",),
        licence="MIT for OpenAI's weights; others: see their page",
        note="ViT-B/32: 151M parameters, 605 MB",
        read=clip_rules.read_hugging_face,
        config=clip_rules.hugging_face_config,
        rules=clip_rules.HUGGING_FACE,
        tokenizer=lambda files, _: CLIPTokenizer.from_merges(files[1]),
    ),
}


class Imported(NamedTuple):
    """Weights under our names."""

    source: Source
    config: Any
    params: Any
    """Nested; arrays of float32 that are made when they are used."""
    tokenizer: Tokenizer | None


def open_source(
    name: str, files: Sequence[Path], *, codes: int = 16384
) -> tuple[Source, Any, dict[str, np.ndarray]]:
    """Opens the files of a source, whose values stay in them until they are used.

    Args:
      name: of the source.
      files: its files, in its order.
      codes: of the codec that a prior samples for.
    Returns:
      The source, the config that its tensors say, and the tensors.
    Raises:
      WeightsError: if there is no such source, or the files are not its own.
    """
    if name not in SOURCES:
        raise WeightsError(f"the source is {name!r}, but must be one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    least = len([file for file in source.files if "optional" not in file])
    if not least <= len(files) <= len(source.files):
        raise WeightsError(
            f"{name} needs the files {', '.join(source.files)}, in this order; got {len(files)}"
        )
    for file in files:
        if not file.is_file():
            raise WeightsError(
                f"there is no file {file}; {name} is published at {', '.join(source.addresses)}"
            )
    tensors = source.read(files)
    if source.kind == "codec":
        return source, source.config(tensors), tensors
    options = {"codes": codes} if source.kind == "prior" else {}
    return source, source.config(tensors, files, **options), tensors


def convert(
    source: Source, config: Any, tensors: Mapping[str, np.ndarray], files: Sequence[Path]
) -> Imported:
    """Brings opened tensors under our names; WeightsError if they do not fit."""
    tokenizer = source.tokenizer and source.tokenizer(files, config)  # before memory is taken
    arrays = to_ours(tensors, source.rules, shapes(config))
    return Imported(source, config, flax.traverse_util.unflatten_dict(arrays, sep="/"), tokenizer)


def card(imported: Imported, name: str, files: Sequence[Path]) -> str:
    """Text of the model card: where the weights are from, on which terms, and from which files."""
    source = imported.source
    opened = "dalle_jax.Clip.load" if source.kind == "clip" else "dalle_jax.load"
    what = codecs.kind(imported.config) if source.kind == "codec" else source.kind
    lines = [
        f"# {name}",
        "",
        f"{source.title}. Weights of others, imported by dalle_jax without a change: `{opened}`.",
        "",
        f"- {what}: {source.title}, published at {', '.join(source.addresses)}; {source.licence}",
        "",
        "Files it was made of, with their sha256:",
        "",
        *(f"- {file.name}: {_digest(file)}" for file in files),
        "",
    ]
    return "\n".join(lines)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache  # tracing a large network takes seconds
def shapes(config: Any) -> dict[str, Shape]:
    """Shapes of our arrays, by their names; nothing is computed."""
    if isinstance(config, clip_network.CLIPConfig):
        network = clip_network.CLIP(config)
        init = partial(network.init, method=lambda clip: clip.log_scale)
    elif isinstance(config, seq2seq_prior.Seq2SeqConfig):
        init = partial(seq2seq_prior.init_params, config)
    elif isinstance(config, gpt_prior.GPTConfig):
        init = partial(gpt_prior.init_params, config)
    else:
        init = partial(codecs.init_params, config)
    shapes = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    flat = flax.traverse_util.flatten_dict(shapes.get("params", shapes), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}
