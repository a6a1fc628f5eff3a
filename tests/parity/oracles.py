"""Runs others' own code on small networks with random weights; needs PyTorch, see Makefile.

    python oracles.py PEERS OUT [GOLDEN]

For each source it writes to OUT the files as they are published, and what the networks make of two
images; with GOLDEN also that without the weights, which `recipe.py` makes again, for the suite.
"""

import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import recipe
import torch
from torch.nn.functional import normalize

PEERS, OUT = Path(sys.argv[1]), Path(sys.argv[2])
GOLDEN = Path(sys.argv[3]) if len(sys.argv) > 3 else None
torch.manual_seed(0)
torch.set_grad_enabled(False)


def module_of(file):
    """A module of a checkout, without the package around it."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, PEERS / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def filled(network, prefix=""):
    """The network with the recipe's weights, and their shapes."""
    shapes = {}
    for name, tensor in network.state_dict().items():
        fixed = any(part in name for part in ("codebook_used", "mask", "idwt"))
        if tensor.is_floating_point() and not fixed:
            shapes[prefix + name] = list(tensor.shape)
            tensor.copy_(torch.from_numpy(recipe.weights(prefix + name, tuple(tensor.shape))))
    return network.eval(), shapes


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def last(x):
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def write(source, shapes, *, golden=True, **arrays):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays["shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(OUT / f"{source}.npz", **arrays)
    if GOLDEN and golden:
        np.savez_compressed(GOLDEN / f"{source}.npz", **arrays)
    print(source, {name: array.shape for name, array in arrays.items() if array.ndim})


def openai_dvae():
    import dall_e

    encoder, a = filled(dall_e.Encoder(n_hid=16, n_blk_per_group=1, vocab_size=32), "")
    decoder, b = filled(dall_e.Decoder(n_init=8, n_hid=16, n_blk_per_group=1, vocab_size=32), "")
    torch.save(encoder, OUT / "encoder.pkl")
    torch.save(decoder, OUT / "decoder.pkl")
    logits = encoder(dall_e.map_pixels(tensor(recipe.images(16))))
    codes = logits.argmax(1)
    hot = torch.nn.functional.one_hot(codes, 32).permute(0, 3, 1, 2).float()
    stats = decoder(hot)
    pixels = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))
    write(
        "openai-dvae", [a, b], codes=codes, features=last(logits), pixels=last(stats),
        images=last(pixels),
    )  # fmt: skip


class Loss(torch.nn.Module):
    """In place of the discriminator, whose tensors a checkpoint also holds."""

    def __init__(self):
        super().__init__()
        self.logvar = torch.nn.Parameter(torch.zeros(3))


class Schedule:
    """In place of the schedule of the Gumbel temperature, which has no tensors."""


def taming(source, file, network):
    network, shapes = filled(network)
    state = network.state_dict()
    callbacks = {Loss: {"best": torch.tensor(1.0)}}  # such classes stand in Lightning's files
    torch.save({"epoch": 1, "state_dict": state, "callbacks": callbacks}, OUT / file)
    z = network.quant_conv(network.encoder(2 * tensor(recipe.images(16)) - 1))
    if hasattr(network.quantize, "embed"):
        logits = network.quantize.proj(z)  # taming draws Gumbel noise here even when it evaluates
        codes, features = logits.argmax(1), logits
        entries = network.quantize.embed(codes)
    else:
        _, _, (_, _, codes) = network.quantize(z)
        codes, features = codes.reshape(2, *z.shape[2:]), z
        entries = network.quantize.embedding(codes)
    pixels = network.decoder(network.post_quant_conv(entries.permute(0, 3, 1, 2)))
    write(source, shapes, codes=codes, features=last(features), pixels=last(pixels))


def taming_vqgans():
    from taming.models.vqgan import GumbelVQ, VQModel

    sizes = {
        "double_z": False,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2],
    }
    sizes |= {"num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
    loss = {"target": "oracles.Loss", "params": {}}
    network = VQModel(sizes | {"z_channels": 8}, loss, n_embed=32, embed_dim=4)
    taming("taming-vqgan", "vqgan.ckpt", network)
    temperature = {"target": "oracles.Schedule", "params": {}}
    network = GumbelVQ(sizes | {"z_channels": 8}, loss, 32, 8, temperature)
    taming("taming-gumbel", "gumbel.ckpt", network)


def llamagen():
    peer = module_of("LlamaGen/tokenizer/tokenizer_image/vq_model.py")
    sizes = peer.ModelArgs(codebook_size=32, codebook_embed_dim=8, z_channels=8)
    sizes.encoder_ch_mult = sizes.decoder_ch_mult = [1, 1]  # small: others widen
    network, shapes = filled(peer.VQModel(sizes))
    torch.save({"model": network.state_dict(), "steps": 3}, OUT / "vq_ds16_c2i.pt")
    z = network.quant_conv(network.encoder(2 * tensor(recipe.images(16)) - 1))
    codes = network.encode(2 * tensor(recipe.images(16)) - 1)[2][2].reshape(2, 8, 8)
    pixels = network.decode_code(codes.reshape(-1), (2, 8, 8, 8))
    write("llamagen-vq", shapes, codes=codes, features=last(normalize(z)), pixels=last(pixels))


def maskgit():
    peer = module_of("1d-tokenizer/modeling/modules/maskgit_vqgan.py")
    config = types.SimpleNamespace(
        channel_mult=[1, 2], num_resolutions=2, hidden_channels=128, num_res_blocks=1,
        num_channels=3, z_channels=8, resolution=16, dropout=0.0,
    )  # fmt: skip
    network = torch.nn.Module()
    network.encoder, network.decoder = peer.Encoder(config), peer.Decoder(config)
    network.quantize = peer.VectorQuantizer(32, 8, 0.25)
    network, shapes = filled(network)
    torch.save(network.state_dict(), OUT / "maskgit.bin")
    z = network.encoder(tensor(recipe.images(16)))
    codes = network.quantize.get_code(z).reshape(2, 8, 8)
    pixels = network.decoder(network.quantize.get_codebook_entry(codes.reshape(2, -1)))
    write("maskgit-vqgan", shapes, codes=codes, features=last(z), pixels=last(pixels))


def clip_images():
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    spread = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (tensor(recipe.images(32)) - mean) / spread


def merges():
    """The recipe's list, as text."""
    path = OUT / "merges.txt"
    path.write_text("#version: 0.2\n" + "\n".join(recipe.MERGES) + "\n", encoding="utf-8")
    return path


def openai_clip():
    peer = module_of("CLIP/clip/model.py")
    V = 512 + len(recipe.MERGES) + 2
    network, shapes = filled(peer.CLIP(16, 32, 2, 128, 8, 16, V, 64, 1, 2))
    tokens = clip_tokens(V)
    traced = torch.jit.trace(network, (clip_images(), tokens), check_trace=False)
    traced.save(str(OUT / "ViT-tiny.pt"))
    image, text = network.encode_image(clip_images()), network.encode_text(tokens)
    write(
        "openai-clip", shapes, tokens=tokens, image=normalize(image), text=normalize(text),
    )  # fmt: skip


def clip_tokens(V):
    """Tokens by the authors' tokenizer with the recipe's merges, as their `tokenize` joins them."""
    import gzip

    packed = OUT / "bpe.txt.gz"
    packed.write_bytes(gzip.compress(merges().read_bytes()))
    tokenizer = module_of("CLIP/clip/simple_tokenizer.py").SimpleTokenizer(str(packed))
    rows = torch.zeros(len(recipe.CAPTIONS), 16, dtype=torch.long)
    for row, caption in zip(rows, recipe.CAPTIONS, strict=True):
        tokens = [V - 2, *tokenizer.encode(caption), V - 1][:16]
        tokens[-1] = V - 1
        row[: len(tokens)] = torch.tensor(tokens)
    return rows


def hugging_face_clip():
    import transformers

    V = 512 + len(recipe.MERGES) + 2
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = transformers.CLIPConfig(
        text_config=sizes | {
            "vocab_size": V, "hidden_size": 64, "intermediate_size": 256,
            "max_position_embeddings": 16,
            "bos_token_id": V - 2, "eos_token_id": V - 1, "pad_token_id": V - 1,
        },
        vision_config=sizes | {
            "hidden_size": 128, "intermediate_size": 512, "image_size": 32, "patch_size": 8,
        },
        projection_dim=16,
    )  # fmt: skip
    network, shapes = filled(transformers.CLIPModel(config))
    network.save_pretrained(OUT / "hf", safe_serialization=True)
    torch.save(network.state_dict(), OUT / "hf" / "pytorch_model.bin")
    tokens = clip_tokens(V)
    image = network.visual_projection(network.vision_model(clip_images()).pooler_output)
    text = network.text_projection(network.text_model(tokens).pooler_output)
    write("hf-clip", shapes, tokens=tokens, image=normalize(image), text=normalize(text))


def mindalle_module(name):
    """A module of minDALL-E, without the code around it, which today's Python refuses."""
    for package in ("dalle", "dalle.models", "dalle.utils"):
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(PEERS / "minDALL-E" / package.replace(".", "/"))]
    return importlib.import_module(f"dalle.{name}")


def mindalle_vqgan():
    import omegaconf

    sizes = omegaconf.OmegaConf.create({
        "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "pdrop": 0.0,
    })  # fmt: skip
    network, shapes = filled(mindalle_module("models.stage1.vqgan").VQGAN(32, 4, sizes))
    torch.save({"state_dict": network.state_dict()}, OUT / "stage1_last.ckpt")
    images = 2 * tensor(recipe.images(16)) - 1
    codes = network.get_codes(images).reshape(2, 8, 8)
    features = network.quant_conv(network.encoder(images))
    pixels = network.decode_code(codes)
    write("mindalle-vqgan", shapes, codes=codes, features=last(features), pixels=last(pixels))


def mindalle():
    import omegaconf

    slots, codes = 20, 24
    vocabulary = {piece: i for i, piece in enumerate(recipe.PIECES)}
    folder = OUT / "gpt"
    for other in filter(None, (OUT, GOLDEN)):
        (other / "gpt").mkdir(exist_ok=True)
    (folder / "bpe-16k-vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(["#version: 0.2", *recipe.MERGES, ""])
    (folder / "bpe-16k-merges.txt").write_text(merges, encoding="utf-8")
    tokenizer = mindalle_module("models.tokenizer").build_tokenizer(
        str(folder), context_length=slots, lowercase=True, dropout=None
    )
    text = torch.tensor([tokenizer.encode(caption).ids for caption in recipe.CAPTIONS])
    sizes = omegaconf.OmegaConf.create({
        "embed_dim": 128, "n_layers": 2, "n_heads": 2, "n_dense_layers": 2, "ctx_len_img": 16,
        "ctx_len_txt": slots, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
        "mlp_bias": True, "attn_bias": True, "gelu_use_approx": False,
    })  # fmt: skip
    peer = mindalle_module("models.stage2.transformer").Transformer1d
    network, shapes = filled(peer(len(vocabulary), codes, sizes))
    torch.save({"state_dict": network.state_dict()}, folder / "stage2_last.ckpt")
    drawn = torch.from_numpy(np.random.RandomState(0).randint(0, codes, (2, 16)))
    place = mindalle_module("utils.sampling").get_positional_encoding
    of_codes, of_text = network(drawn, text[:2], place(drawn), place(text[:2]))
    greedy = mindalle_module("utils.sampling").sampling(
        network, text, top_k=1, is_tqdm=False, use_fp16=False, max_seq_len=16
    )
    write(
        "gpt/mindalle", shapes, text=text, codes=drawn, code_logits=of_codes,
        text_logits=of_text, greedy=greedy,
    )  # fmt: skip


def counts():
    """Parameters of the published sizes, by the peers' own code, without memory."""
    import dall_e
    from taming.models.vqgan import GumbelVQ, VQModel

    def size(network):
        return sum(
            p.numel()
            for n, p in network.named_parameters()
            if not n.startswith("loss") and "used" not in n
        )

    llama = module_of("LlamaGen/tokenizer/tokenizer_image/vq_model.py")
    mask = module_of("1d-tokenizer/modeling/modules/maskgit_vqgan.py")
    clip = module_of("CLIP/clip/model.py")
    loss = {"target": "oracles.Loss", "params": {}}
    schedule = {"target": "oracles.Schedule", "params": {}}
    f16 = {
        "double_z": False,
        "z_channels": 256,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
    }
    f16 |= {
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
    }
    f8 = f16 | {"ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
    config = types.SimpleNamespace(
        channel_mult=[1, 1, 2, 2, 4], num_resolutions=5, hidden_channels=128, num_res_blocks=2,
        num_channels=3, z_channels=256, resolution=256, dropout=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        found = {
            "openai-dvae encoder": size(dall_e.Encoder(device=torch.device("meta"))),
            "openai-dvae decoder": size(dall_e.Decoder(device=torch.device("meta"))),
            "taming f16 1024": size(VQModel(f16, loss, 1024, 256)),
            "taming f16 16384": size(VQModel(f16, loss, 16384, 256)),
            "taming gumbel f8": size(GumbelVQ(f8, loss, 8192, 256, schedule)),
            "llamagen VQ-16": size(llama.VQ_16()),
            "llamagen VQ-8": size(llama.VQ_8()),
            "maskgit-vqgan": size(mask.Encoder(config)) + size(mask.Decoder(config)) + 1024 * 256,
            "mindalle": size(
                mindalle_module("models.stage2.transformer").Transformer1d(
                    16384,
                    16384,
                    types.SimpleNamespace(
                        embed_dim=1536,
                        n_layers=42,
                        n_dense_layers=42,
                        n_heads=24,
                        ctx_len_img=256,
                        ctx_len_txt=64,
                        embd_pdrop=0.0,
                        resid_pdrop=0.0,
                        attn_pdrop=0.0,
                        mlp_bias=True,
                        attn_bias=True,
                        gelu_use_approx=False,
                    ),
                )
            ),
            "clip ViT-B/32": size(clip.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)),
        }
    (OUT / "counts.json").write_text(json.dumps(found, indent=1) + "\n")
    if GOLDEN:
        (GOLDEN / "counts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import shims  # noqa: F401  before the peers

    sys.modules["oracles"] = sys.modules["__main__"]  # taming finds Loss by this name
    import rudalle_oracles

    OUT.mkdir(parents=True, exist_ok=True)
    for oracle in (
        openai_dvae, taming_vqgans, llamagen, maskgit, openai_clip, hugging_face_clip,
        mindalle_vqgan, mindalle, counts, rudalle_oracles.main,
    ):  # fmt: skip
        oracle()
