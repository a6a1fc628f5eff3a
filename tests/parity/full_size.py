"""Writes a published size with random weights, in others' layout, to measure what importing takes.

    python full_size.py SOURCE FOLDER [float16]

SOURCE is one of those below; the files get the names that they are published by. The vocabularies
are small ones, but for CLIP's, whose length counts.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import msgpack
import numpy as np
import recipe

from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.maskgit_vqgan import MaskGITVQGANConfig
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.text.clip_bpe import MERGES, SIGNS
from dalle_jax.weights import codec_rules, seq2seq_rules, sources
from dalle_jax.weights.export import write_codec
from dalle_jax.weights.rules import to_theirs
from dalle_jax.weights.torch_write import write_torch

MINI = Seq2SeqConfig(
    width=1024, heads=16, mlp=2730, encoder_depth=12, decoder_depth=12, text_vocabulary=50264,
    image_vocabulary=16385,
)  # fmt: skip
MEGA = Seq2SeqConfig()


def drawn(shape, dtype="float32"):
    """Random numbers about as large as trained ones."""
    numbers = np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)
    numbers *= 0.02
    return numbers.astype(dtype)


def arrays_of(config):
    return {name: drawn(shape) for name, shape in sources.shapes(config).items()}


def openai_dvae(out, dtype):
    write_codec("openai-dvae", DVAEConfig(), arrays_of(DVAEConfig()), out / "encoder.pkl")


def taming_vqgan(out, dtype):
    config = VQGANConfig(codes=16384)
    write_codec("taming-vqgan", config, arrays_of(config), out / "last.ckpt")


def llamagen(out, dtype):
    tensors = to_theirs(
        arrays_of(VQGANConfig(codes=16384, code_width=8, quantizer="cosine")),
        codec_rules.LLAMAGEN,
    )
    write_torch(out / "vq_ds16_c2i.pt", {"model": numbered_coarse_to_fine(tensors)})


def numbered_coarse_to_fine(tensors):
    """The decoder's groups as LlamaGen numbers them."""
    head, last = "decoder.conv_blocks.", 4
    turned = {}
    for name, tensor in tensors.items():
        if name.startswith(head):
            number, _, rest = name.removeprefix(head).partition(".")
            name = f"{head}{last - int(number)}.{rest}"
        turned[name] = tensor
    return turned


def maskgit(out, dtype):
    tensors = to_theirs(arrays_of(MaskGITVQGANConfig()), codec_rules.MASKGIT)
    write_torch(out / "maskgit-vqgan-imagenet-f16-256.bin", tensors)


def dalle_mini_vqgan(out, dtype):
    tensors = to_theirs(
        arrays_of(VQGANConfig(codes=16384, unit_pixels=True)), codec_rules.DALLE_MINI
    )
    write_msgpack(out / "flax_model.msgpack", {k: v.shape for k, v in tensors.items()}, "float32")


def dalle_mini(config, out, dtype):
    rules = seq2seq_rules.DALLE_MINI
    shapes = {}
    for name, shape in sources.shapes(config).items():
        (theirs,) = to_theirs({name: np.empty([1] * len(shape), np.float32)}, rules)
        shapes[theirs] = shape
    write_msgpack(out / "flax_model.msgpack", shapes, dtype)
    pieces = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", *SIGNS.values(), "ca"])}
    (out / "vocab.json").write_text(json.dumps(pieces))
    (out / "merges.txt").write_text("#version: 0.2\nc a\n")
    sizes = {
        "d_model": config.width, "encoder_layers": config.encoder_depth,
        "decoder_layers": config.decoder_depth, "encoder_vocab_size": config.text_vocabulary,
        "max_text_length": config.text_slots, "image_length": config.grid**2,
        "image_vocab_size": config.image_vocabulary - 1,
        "decoder_start_token_id": config.start_of_image,
    }  # fmt: skip
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_attention_heads": config.heads, f"{half}_ffn_dim": config.mlp}
    (out / "config.json").write_text(json.dumps(sizes))


def write_msgpack(path, shapes, dtype):
    """What flax writes, an array after the other."""
    tree = {}
    for name, shape in shapes.items():
        *parents, leaf = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = shape
    packer = msgpack.Packer()

    def write(node):
        if isinstance(node, tuple):
            array = drawn(node, dtype)
            content = msgpack.packb((node, array.dtype.name, array.tobytes()))
            file.write(packer.pack_ext_type(1, content))
            return
        file.write(packer.pack_map_header(len(node)))
        for key, value in node.items():
            file.write(packer.pack(key))
            write(value)

    with path.open("wb") as file:
        write(tree)


def mindalle(out, dtype):
    config = GPTConfig(pad=1)
    D, V, K = config.width, config.text_vocabulary, config.codes
    shapes = {"tok_emb_txt.weight": (V, D), "pos_emb_txt.weight": (config.text_slots, D)}
    shapes |= {"tok_emb_img.weight": (K, D), "pos_emb_img.weight": (config.grid**2, D)}
    layer = [f"attn.{name}" for name in ("query", "key", "value", "proj")]
    sizes = dict.fromkeys(layer, (D, D)) | {"mlp.0": (4 * D, D), "mlp.2": (D, 4 * D)}
    for i in range(config.depth):
        shapes |= norm(f"blocks.{i}.ln1", D) | norm(f"blocks.{i}.ln2", D)
        for name, shape in sizes.items():
            shapes |= linear(f"blocks.{i}.{name}", *shape)
    shapes |= norm("ln_f", D) | {"head_txt.weight": (V, D), "head_img.weight": (K, D)}
    state = {name: drawn(shape, dtype) for name, shape in shapes.items()}
    write_torch(out / "stage2_last.ckpt", {"state_dict": state})
    vocabulary = {piece: i for i, piece in enumerate(recipe.PIECES)}
    (out / "bpe-16k-vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(["#version: 0.2", *recipe.MERGES, ""])
    (out / "bpe-16k-merges.txt").write_text(merges, encoding="utf-8")


def malevich(out, dtype):
    D, V, P, G, K = 2048, 16384, 128, 32, 8192
    shapes = {
        "text_embeddings.weight": (V + P, D), "text_pos_embeddings.weight": (P + 1, D),
        "image_embeddings.weight": (K, D), "image_row_embeddings.weight": (G, D),
        "image_col_embeddings.weight": (G, D),
    }  # fmt: skip
    norms = ("input", "before_first_addition", "post_attention", "before_second_addition")
    linears = {
        "attention.query_key_value": (3 * D, D), "attention.dense": (D, D),
        "mlp.dense_h_to_4h": (4 * D, D), "mlp.dense_4h_to_h": (D, 4 * D),
    }  # fmt: skip
    for i in range(24):
        layer = f"transformer.layers.{i}"
        for name in norms:
            shapes |= norm(f"{layer}.{name}_layernorm", D)
        for name, shape in linears.items():
            shapes |= linear(f"{layer}.{name}", *shape)
    shapes |= norm("transformer.final_layernorm", D) | norm("to_logits.0", D)
    shapes |= linear("to_logits.1", V + P + K, D)
    state = {name: drawn(shape, dtype) for name, shape in shapes.items()}
    write_torch(out / "pytorch_model_v3.bin", state)
    letters = range(ord("a"), ord("z") + 1)
    numbers = [(0x2581, 4), *((code, 5 + i) for i, code in enumerate(letters))]
    lines = [f"{len(numbers)} 0", *(f"{code} {number}" for code, number in numbers), "1 0 2 3"]
    (out / "bpe.model").write_text("\n".join(lines) + "\n")


def hugging_face_clip(out, dtype):
    c = CLIPConfig(
        px=224, patch=32, image_width=768, image_depth=12, image_heads=12, text_width=512,
        text_depth=12, text_heads=8, text_vocabulary=49406, text_length=77, features=512,
    )  # fmt: skip
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    shapes = {
        f"{vision}patch_embedding.weight": (c.image_width, 3, c.patch, c.patch),
        f"{vision}class_embedding": (c.image_width,),
        f"{vision}position_embedding.weight": (c.grid**2 + 1, c.image_width),
        f"{text}token_embedding.weight": (c.text_vocabulary + 2, c.text_width),
        f"{text}position_embedding.weight": (c.text_length, c.text_width),
        "visual_projection.weight": (c.features, c.image_width),
        "text_projection.weight": (c.features, c.text_width),
        "logit_scale": (),
    }
    for part, D, depth in (
        ("vision", c.image_width, c.image_depth), ("text", c.text_width, c.text_depth),
    ):  # fmt: skip
        for i in range(depth):
            layer = f"{part}_model.encoder.layers.{i}"
            shapes |= norm(f"{layer}.layer_norm1", D) | norm(f"{layer}.layer_norm2", D)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{name}", D, D)
            shapes |= linear(f"{layer}.mlp.fc1", 4 * D, D) | linear(f"{layer}.mlp.fc2", D, 4 * D)
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= norm(f"vision_model.{name}", c.image_width)
    shapes |= norm("text_model.final_layer_norm", c.text_width)
    write_torch(out / "pytorch_model.bin", {name: drawn(shape) for name, shape in shapes.items()})
    pairs = itertools.islice(itertools.product(SIGNS.values(), repeat=2), MERGES)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, out, inputs):
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


WRITERS = {
    "openai-dvae": openai_dvae,
    "taming-vqgan": taming_vqgan,
    "llamagen-vq": llamagen,
    "maskgit-vqgan": maskgit,
    "dalle-mini-vqgan": dalle_mini_vqgan,
    "dalle-mini": lambda out, dtype: dalle_mini(MINI, out, dtype),
    "dalle-mega": lambda out, dtype: dalle_mini(MEGA, out, dtype),
    "mindalle": mindalle,
    "malevich": malevich,
    "hf-clip": hugging_face_clip,
}

if __name__ == "__main__":
    source, folder, *dtype = sys.argv[1:]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    WRITERS[source](out, dtype[0] if dtype else "float32")
    print(*(f"{path}: {path.stat().st_size:,} bytes" for path in sorted(out.iterdir())), sep="\n")
