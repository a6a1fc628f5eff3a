"""Imported networks give what others' own code gave: golden/weights, by parity/*oracles.py."""

import json
import math
from pathlib import Path

import compare
import flax.serialization
import flax.traverse_util
import numpy as np
import pytest
import recipe
import safetensors.numpy

from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGANConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights import sources
from dalle_jax.weights.torch_write import write_torch

GOLDEN = Path(__file__).parent.parent / "golden" / "weights"


def published(source, shapes, folder):
    """Files of a source with the recipe's weights."""

    def made(shapes):
        return {name: recipe.weights(name, tuple(shape)) for name, shape in shapes.items()}

    if source == "openai-dvae":
        files = [folder / "encoder.pkl", folder / "decoder.pkl"]
        for file, part in zip(files, shapes, strict=True):
            write_torch(file, made(part))
        return files
    if source.endswith("clip"):
        merges = folder / "merges.txt"
        merges.write_text("#version: 0.2\n" + "\n".join(recipe.MERGES) + "\n", encoding="utf-8")
        if source == "openai-clip":
            write_torch(folder / "clip.pt", made(shapes))
            return [folder / "clip.pt", merges]
        safetensors.numpy.save_file(made(shapes), folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps({f"{x}_config": {"num_attention_heads": 2} for x in ("text", "vision")})
        )
        return [folder / "model.safetensors", merges, folder / "config.json"]
    if source == "dalle-mini-vqgan":
        params = flax.traverse_util.unflatten_dict(made(shapes), sep="/")
        (folder / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
        return [folder / "m.msgpack"]
    key = "model" if source == "llamagen-vq" else "state_dict"
    write_torch(folder / "last.ckpt", {"epoch": 1, key: made(shapes)})
    return [folder / "last.ckpt"]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_imported_networks_give_what_the_peer_gave(name, tmp_path):
    expected = np.load(GOLDEN / f"{name}.npz")
    files = published(name, json.loads(str(expected["shapes"])), tmp_path)
    found = compare.differences(compare.FILES[name][0], files, expected)
    assert compare.within(found), found


def test_sizes_are_those_that_others_code_counts():
    counts = json.loads((GOLDEN / "counts.json").read_text())
    f8 = {"multipliers": (1, 1, 2, 4), "attention": (8,), "codes": 8192, "quantizer": "logits"}
    llama = {"codes": 16384, "code_width": 8, "quantizer": "cosine"}
    llama8 = {"multipliers": (1, 2, 2, 4), "attention": (8,)}
    ours = {
        "taming f16 1024": VQGANConfig(),
        "taming f16 16384": VQGANConfig(codes=16384),
        "taming gumbel f8": VQGANConfig(**f8),
        "llamagen VQ-16": VQGANConfig(**llama),
        "llamagen VQ-8": VQGANConfig(**llama | llama8),
        "maskgit-vqgan": MaskGITVQGANConfig(),
        "clip ViT-B/32": CLIPConfig(),
    }
    for name, config in ours.items():
        assert sum(map(math.prod, sources.shapes(config).values())) == counts[name], name
    dvae = sources.shapes(DVAEConfig())
    for half in ("encoder", "decoder"):
        total = sum(math.prod(shape) for name, shape in dvae.items() if name.startswith(half))
        assert total == counts[f"openai-dvae {half}"]
