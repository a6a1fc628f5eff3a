"""Imports files and compares what our networks make of them with what others' code made.

    python compare.py FILES

compares the files that `oracles.py` has written there, and ends with status 1 if any differs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import recipe

from dalle_jax.generate import imported_sampler
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.generate.tensor_file import flatten_params
from dalle_jax.models import dvae, gpt_prior, vqgan
from dalle_jax.models.dvae import DVAE, DVAEConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGAN
from dalle_jax.models.masks import attention_mask, window_mask
from dalle_jax.models.vqgan import VQGAN, VQGANConfig
from dalle_jax.weights import sources
from dalle_jax.weights.export import Layout, write_codec

FILES = {
    "openai-dvae": ("openai-dvae", ["encoder.pkl", "decoder.pkl"]),
    "taming-vqgan": ("taming-vqgan", ["vqgan.ckpt"]),
    "taming-gumbel": ("taming-vqgan", ["gumbel.ckpt"]),
    "dalle-mini-vqgan": ("dalle-mini-vqgan", ["dalle-mini-vqgan.msgpack"]),
    "mindalle-vqgan": ("mindalle-vqgan", ["stage1_last.ckpt"]),
    "llamagen-vq": ("llamagen-vq", ["vq_ds16_c2i.pt"]),
    "maskgit-vqgan": ("maskgit-vqgan", ["maskgit.bin"]),
    "openai-clip": ("openai-clip", ["ViT-tiny.pt", "bpe.txt.gz"]),
    "hf-clip": ("hf-clip", ["hf/model.safetensors", "merges.txt", "hf/config.json"]),
    "malevich-vqgan": ("malevich-vqgan", ["vqgan.gumbelf8-sber.model.ckpt"]),
    "malevich-dwt": ("malevich-dwt", ["vqgan.gumbelf8-sber-dwt.model.ckpt"]),
    "gpt/malevich-v2": ("malevich-v2", ["gpt/pytorch_model_v2.bin", "gpt/bpe.model"]),
    "gpt/malevich-v3": ("malevich", ["gpt/pytorch_model_v3.bin", "gpt/bpe.model"]),
    "hf-clip .bin": ("hf-clip", ["hf/pytorch_model.bin", "merges.txt", "hf/config.json"]),
}
"""Source and files of each network of the oracles."""
CODES = 24
"""Of the codecs that the small priors were made for."""
FLOATS = 1e-4
"""How far features, logits and pixels may be apart, relative to the largest."""


def differences(source, files, expected):
    """How far apart they are, by names; the first of them must be 0."""
    imported = imported_from(source, files)
    compare = {"clip": _clip, "codec": _codec, "prior": _prior}[imported.source.kind]
    return compare(imported, expected)


def imported_from(source, files):
    """The weights of these files."""
    info, config, tensors = sources.open_source(source, files, codes=CODES)
    found = sources.convert(info, config, tensors, files)
    return found._replace(params=jax.tree.map(np.asarray, found.params))


def _codec(imported, expected):
    config, params = imported.config, imported.params
    px = 32 if getattr(config, "wavelets", False) else 16
    images = recipe.images(px)
    model = Model(name="x", px=px, codec=config, codec_params=params, kernels="float32")
    features, pixels = jax.jit(_floats, static_argnums=0)(config, params, images, expected["codes"])
    got = model.decode(expected["codes"])
    wanted = _uint8(config, expected)
    return {
        "codes": float((model.encode(images) != expected["codes"]).sum()),
        "images, of 255": float(np.abs(got.astype(int) - wanted).max()),
        **_exported(imported, model),
        "features": _apart(features, expected["features"]),
        "pixels": _apart(pixels, expected["pixels"]),
    }


def _exported(imported, model):
    """How many tensors come back other than they came, where theirs is a layout to export to."""
    layout = next(name for name, source in sources.SOURCES.items() if source is imported.source)
    if layout not in get_args(Layout):
        return {}
    arrays = flatten_params(jax.device_get(model.codec_params))
    with tempfile.TemporaryDirectory() as folder:
        files = write_codec(layout, model.codec, arrays, Path(folder) / "new.ckpt")
        _, _, tensors = sources.open_source(layout, files)
        again = sources.convert(imported.source, model.codec, tensors, files)
        pairs = zip(*map(jax.tree.leaves, (again.params, imported.params)), strict=True)
        return {"exported": float(sum(not np.array_equal(*pair) for pair in pairs))}


def _floats(config, params, images, codes):
    """Features or logits of each cell, and what the decoder makes of codes."""
    variables = {"params": params}
    if isinstance(config, DVAEConfig):
        features = DVAE(config).apply(variables, dvae.preprocess(images), method="encode")
        return features, DVAE(config).apply(variables, codes, method="decode")
    if isinstance(config, VQGANConfig):
        network = VQGAN(config)
        unit = vqgan.preprocess(images) / 2 + 0.5
        z = network.apply(
            variables, unit if config.unit_pixels else vqgan.preprocess(images), method="encode"
        )
        if config.quantizer == "cosine":
            z = vqgan.unit(z)
        if config.quantizer == "logits":
            kernel, bias = params["quantize"]["proj"]["kernel"], params["quantize"]["proj"]["bias"]
            z = z @ kernel[0, 0] + bias[None, None, None]
        return z, network.apply(variables, codes, method="decode")
    network = MaskGITVQGAN(config)
    pixels = jnp.asarray(images, jnp.float32) / 255
    z = network.apply(variables, pixels, method=lambda network, x: network.encoder(x))
    return z, network.apply(variables, codes, method="decode")


def _uint8(config, expected):
    pixels = expected["pixels"]
    if isinstance(config, DVAEConfig):
        pixels = expected["images"]
    elif isinstance(config, VQGANConfig) and not config.unit_pixels:
        pixels = (pixels + 1) / 2
    return np.round(255 * pixels.clip(0, 1)).astype(int)


def _clip(imported, expected):
    clip = Clip(
        name="x",
        config=imported.config,
        params=imported.params,
        tokenizer=imported.tokenizer,
        kernels="float32",
    )
    V, P = imported.config.text_vocabulary, imported.config.text_length
    slots = imported.tokenizer.encode(recipe.CAPTIONS, length=P - 2)
    wrong = 0
    for row, tokens in zip(slots, expected["tokens"], strict=True):
        ours = [V, *(i for i in row if i < V), V + 1]
        wrong += list(tokens[: len(ours)]) != ours or any(tokens[len(ours) :])
    return {
        "captions with other tokens": float(wrong),
        "images": _apart(clip.encode_images(recipe.images(32)), expected["image"]),
        "captions": _apart(clip.encode_texts(recipe.CAPTIONS), expected["text"]),
    }


def _prior(imported, expected):
    config, params = imported.config, jax.tree.map(jnp.asarray, imported.params)
    text = imported.tokenizer.encode(recipe.RUSSIAN, length=config.text_slots)
    theirs = np.where(text < config.text_vocabulary, text, 0)  # before each slot gets its pad
    forward = jax.jit(gpt_prior.forward, static_argnums=0)
    logits = forward(config, params, jnp.asarray(text[:2]), jnp.asarray(expected["codes"]))
    keys, greedy = jax.random.split(jax.random.key(0), len(text)), SamplingConfig(temperature=0)
    codes = imported_sampler.sample(config, params, text, keys, sampling=greedy)
    return {
        "captions with other tokens": float((theirs != expected["text"]).any(axis=1).sum()),
        "likeliest codes": float((codes.reshape(len(text), -1) != expected["greedy"]).sum()),
        "text": _apart(logits[0], expected["text_logits"]),
        "code": _apart(logits[1], expected["code_logits"]),
    }


def other_masks(found):
    """Names of masks that are not those of ruDALL-E's functions."""
    names = []
    for name, wanted in found.items():
        kind, *sizes = name.split()
        text, grid, kernel = map(int, sizes)
        mask = attention_mask("dense", text_length=text, grid=grid)
        if kind in ("row", "column"):
            mask = attention_mask(kind, text_length=text, grid=grid)
        else:
            mask[text:, text:] = window_mask(grid=grid, kernel=kernel, wraps=kind == "conv-v2")
        names += [] if np.array_equal(mask, wanted) else [name]
    return names


def _apart(got, wanted):
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


def within(found):
    """Whether they are as near as they should be."""
    exact, *floats = found.items()
    limits = {"images, of 255": 1.0, "exported": 0.0, "likeliest codes": 0.0}
    return exact[1] == 0 and all(value <= limits.get(name, FLOATS) for name, value in floats)


def main(folder):
    """Compares all files; the exit status."""
    status = 0
    for name, (source, files) in FILES.items():
        expected = np.load(folder / f"{name.split()[0]}.npz")
        found = differences(source, [folder / file for file in files], expected)
        said = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
        print(f"{name}: {said}: {'equal' if within(found) else 'DIFFERENT'}")
        status |= not within(found)
    masks = np.load(folder / "malevich-masks.npz")
    other = other_masks(masks)
    print(f"masks of ruDALL-E: {len(masks)} compared: {', '.join(other) or 'equal'}")
    status |= bool(other)
    counted = json.loads((folder / "counts.json").read_text())
    print("published sizes, by others' code:", counted)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
