"""The oracles of ruDALL-E: its package's own code, with taming and YouTokenToMe; see oracles.py."""

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np
import recipe
import torch
from oracles import GOLDEN, OUT, filled, last, tensor, write

SLOTS, CODES, GRID = 12, 24, 8
VERSIONS = ("v2", "v3")


def module(name):
    """A module of the package, without the code around it, which today's libraries refuse."""
    import huggingface_hub

    huggingface_hub.cached_download = None  # which is gone; nothing is downloaded here
    root = Path(importlib.metadata.distribution("rudalle").locate_file("rudalle"))
    for package in ("rudalle", "rudalle.dalle", "rudalle.vae"):
        made = sys.modules.setdefault(package, types.ModuleType(package))
        made.__path__ = [str(root / package.removeprefix("rudalle").strip("."))]
    return importlib.import_module(f"rudalle.{name}")


def vqgan(*, dwt):
    import omegaconf

    ddconfig = {
        "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
    }  # fmt: skip
    params = {"ddconfig": ddconfig, "n_embed": 32, "embed_dim": 8, "kl_weight": 1e-8}
    config = omegaconf.OmegaConf.create({"model": {"params": params}})
    network, shapes = filled(module("vae.model").VQGanGumbelVAE(config, dwt=dwt))
    if not dwt:  # published without the name of the wrapper
        state = network.model.state_dict()
        torch.save({"epoch": 1, "state_dict": state}, OUT / "vqgan.gumbelf8-sber.model.ckpt")
    else:
        state = {"state_dict": network.state_dict()}
        torch.save(state, OUT / "vqgan.gumbelf8-sber-dwt.model.ckpt")
    images = tensor(recipe.images(16))
    if dwt:  # ours takes images of the size that it makes
        images = torch.nn.functional.avg_pool2d(tensor(recipe.images(32)), 2)
    codes = network.get_codebook_indices(images, disable_gumbel_softmax=True).reshape(2, 8, 8)
    z = network.model.quant_conv(network.model.encoder(2 * images - 1))
    pixels = network.model.decode(network.model.quantize.embed(codes).permute(0, 3, 1, 2))
    seen = network.decode(codes.reshape(2, -1))
    np.testing.assert_array_equal((pixels.clamp(-1, 1) + 1) * 0.5, seen)
    write(
        "malevich-dwt" if dwt else "malevich-vqgan", shapes, golden=dwt, codes=codes,
        features=last(network.model.quantize.proj(z)), pixels=last(pixels),
    )  # fmt: skip


def tokens(folder):
    """The small vocabulary, and the recipe's captions as the release makes them tokens."""
    import youtokentome

    path, known = folder / "bpe.model", GOLDEN and GOLDEN / "gpt" / "malevich-v3.npz"
    if known and known.exists():  # training breaks ties another way each time
        path.write_text(str(np.load(known)["bpe_model"]))
    else:
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(recipe.RUSSIAN_CORPUS), encoding="utf-8")
        youtokentome.BPE.train(data=str(corpus), model=str(path), vocab_size=130, n_threads=1)
    wrapper = module("tokenizer").get_tokenizer(path=str(path))
    texts = [caption.lower().strip() for caption in recipe.RUSSIAN]
    return path.read_text(), torch.stack(
        [wrapper.encode_text(text, text_seq_length=SLOTS) for text in texts]
    )


def malevich():
    for other in filter(None, (OUT, GOLDEN)):
        (other / "gpt").mkdir(exist_ok=True)
    model, text = tokens(OUT / "gpt")
    for version in VERSIONS:
        network, shapes = filled(
            module("dalle.model").DalleModel(
                device="cpu", num_layers=4, vocab_size=130 + SLOTS, hidden_size=256,
                num_attention_heads=2, embedding_dropout_prob=0.1, attention_dropout_prob=0.1,
                output_dropout_prob=0.1, text_seq_length=SLOTS, image_tokens_per_dim=GRID,
                image_vocab_size=CODES, cogview_sandwich_layernorm=True, cogview_pb_relax=True,
                hf_version=version,
            )
        )  # fmt: skip
        torch.save(network.state_dict(), OUT / "gpt" / f"pytorch_model_{version}.bin")
        T = SLOTS + GRID**2
        causal = torch.tril(torch.ones((len(text), 1, T, T)))
        codes = torch.from_numpy(np.random.RandomState(0).randint(0, CODES, (2, GRID**2)))
        ids = torch.cat([text[:2], codes[:, :-1]], dim=1)
        logits, _ = network(ids, causal[:2])
        before = logits.shape[1] - GRID**2  # positions that predict text
        drawn, cache = text, None
        for _ in range(GRID**2):
            found, cache = network(drawn, causal, use_cache=True, cache=cache)
            likeliest = found[:, -1, 130 + SLOTS :].argmax(-1, keepdim=True)
            drawn = torch.cat([drawn, likeliest], dim=-1)
        write(
            f"gpt/malevich-{version}", shapes, bpe_model=model, text=text, codes=codes,
            text_logits=logits[:, :before, : 130 + SLOTS],
            code_logits=logits[:, before:, 130 + SLOTS :], greedy=drawn[:, SLOTS:],
        )  # fmt: skip


def masks():
    """The release's masks at the published size, and at small ones; none is golden."""
    peer = module("dalle.image_attention")
    found = {}
    for text, grid, kernel in ((6, 4, 3), (16, 8, 11), (5, 12, 5), (128, 32, 11)):
        name = f"{text} {grid} {kernel}"
        found[f"row {name}"] = peer.get_row_mask(text, grid, is_bool_mask=True)
        found[f"column {name}"] = peer.get_col_mask(text, grid, is_bool_mask=True)
        for version in VERSIONS:
            mask = peer.get_conv_mask(text, grid, kernel, is_bool_mask=True, hf_version=version)
            found[f"conv-{version} {name}"] = mask
    np.savez_compressed(OUT / "malevich-masks.npz", **found)


def count():
    """Parameters at the published size of Malevich and of Kandinsky."""
    sizes = {"Malevich": (24, 2048, 16), "Kandinsky": (64, 3840, 60)}
    found = {}
    for name, (layers, width, heads) in sizes.items():
        with torch.device("meta"):
            peer = module("dalle.model").DalleModel(
                device="meta", num_layers=layers, vocab_size=16384 + 128, hidden_size=width,
                num_attention_heads=heads, embedding_dropout_prob=0.1, attention_dropout_prob=0.1,
                output_dropout_prob=0.1, text_seq_length=128, image_tokens_per_dim=1,
                image_vocab_size=8192, cogview_sandwich_layernorm=True, cogview_pb_relax=True,
            )  # fmt: skip
        # a grid of 1 makes no large masks; rows and columns of 32 are added
        found[name] = sum(p.numel() for p in peer.parameters()) + 2 * 31 * width
    for folder in filter(None, (OUT, GOLDEN)):
        (folder / "gpt" / "malevich-counts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


def main():
    """Runs all of them."""
    vqgan(dwt=False)
    vqgan(dwt=True)
    malevich()
    masks()
    count()
