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

from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import flatten_params
from dalle_jax.models import dvae, vqgan
from dalle_jax.models.dvae import DVAE, DVAEConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGAN
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
    "hf-clip .bin": ("hf-clip", ["hf/pytorch_model.bin", "merges.txt", "hf/config.json"]),
}
"""Source and files of each network of `oracles.py` and `flax_oracles.py`."""
FLOATS = 1e-4
"""How far features, logits and pixels may be apart, relative to the largest."""


def differences(source, files, expected):
    """How far apart they are, by names; the first of them must be 0."""
    imported = _imported(source, files)
    compare = _clip if imported.tokenizer else _codec
    return compare(imported, expected)


def _imported(source, files):
    info, config, tensors = sources.open_source(source, files)
    return sources.convert(info, config, tensors, files)


def _codec(imported, expected):
    config, params = imported.config, imported.params
    images = recipe.images(16)
    model = Model(name="x", px=16, codec=config, codec_params=params, kernels="float32")
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


def _apart(got, wanted):
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


def within(found):
    """Whether they are as near as they should be."""
    exact, *floats = found.items()
    limits = {"images, of 255": 1.0, "exported": 0.0}
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
    counted = json.loads((folder / "counts.json").read_text())
    print("published sizes, by others' code:", counted)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
