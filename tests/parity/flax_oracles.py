"""Runs others' own flax code on small networks with random weights, in our environment.

    python flax_oracles.py PEERS OUT [GOLDEN]

Writes what `oracles.py` writes of networks in PyTorch. Their packages need the last transformers
with flax, which `install.sh` puts into PEERS/flax.
"""

import json
import sys
import types
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import recipe

PEERS, OUT = Path(sys.argv[1]), Path(sys.argv[2])
GOLDEN = Path(sys.argv[3]) if len(sys.argv) > 3 else None


def filled(network, *inputs):
    """The recipe's weights for a network, and their shapes."""
    drawn = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    shapes = {k: v.shape for k, v in flax.traverse_util.flatten_dict(drawn, sep="/").items()}
    flat = {name: recipe.weights(name, shape) for name, shape in shapes.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/"), shapes


def write(source, params, shapes, **arrays):
    (OUT / f"{source}.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays["shapes"] = np.array(json.dumps(shapes))
    for folder in filter(None, (OUT, GOLDEN)):
        np.savez_compressed(folder / f"{source}.npz", **arrays)
    print(source, {name: array.shape for name, array in arrays.items() if array.ndim})


def dalle_mini_vqgan():
    sys.path.insert(0, str(PEERS / "vqgan-jax"))
    from vqgan_jax.configuration_vqgan import VQGANConfig
    from vqgan_jax.modeling_flax_vqgan import VQModule

    network = VQModule(
        VQGANConfig(
            ch_mult=(1, 2), num_res_blocks=1, resolution=16, attn_resolutions=(8,), z_channels=8,
            n_embed=32, embed_dim=4,
        )
    )  # fmt: skip
    images = jnp.asarray(recipe.images(16), jnp.float32) / 255
    params, shapes = filled(network, images)
    variables = {"params": params}
    _, codes = network.apply(variables, images, method="encode")
    features = network.apply(
        variables, images, method=lambda network, x: network.quant_conv(network.encoder(x))
    )
    pixels = network.apply(variables, codes, method="decode_code")
    write(
        "dalle-mini-vqgan", params, shapes, codes=codes.reshape(2, 8, 8), features=features,
        pixels=pixels,
    )  # fmt: skip


def dalle_mini_modules():
    """Its config and network, without the package around them, which logs to a service."""
    jnp.DeviceArray = jax.Array  # that JAX has renamed
    source = PEERS / "dalle-mini" / "src" / "dalle_mini"
    for name, folder in (("dalle_mini", source), ("dalle_mini.model", source / "model")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    utils = types.ModuleType("utils")
    utils.PretrainedFromWandbMixin = type("Mixin", (), {})
    sys.modules["dalle_mini.model.utils"] = utils
    from dalle_mini.model.configuration import DalleBartConfig
    from dalle_mini.model.modeling import FlaxBartForConditionalGenerationModule

    return DalleBartConfig, FlaxBartForConditionalGenerationModule


def inputs_of(config, text, codes):
    """What the network takes: the start before the codes, masks and positions."""
    start = jnp.full_like(codes[:, :1], config.decoder_start_token_id)
    codes = jnp.concatenate([start, codes[:, :-1]], axis=1)
    places = [jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape) for x in (text, codes)]
    return text, (text != 1).astype(int), codes, jnp.ones_like(codes), *places


def dalle_mini():
    Config, Network = dalle_mini_modules()
    sizes = {
        "encoder_vocab_size": 40, "image_vocab_size": 31, "image_length": 16, "max_text_length": 8,
        "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "dropout": 0.0,
        "decoder_start_token_id": 20, "pad_token_id": 21, "gradient_checkpointing": False,
    }  # fmt: skip
    text = jnp.asarray([[0, 7, 9, 2, 1, 1, 1, 1], [0, 3, 30, 8, 39, 11, 12, 2]])
    codes = jnp.asarray(np.random.RandomState(0).randint(0, 20, (2, 16)))
    for name, scan in (("dalle-mini", False), ("dalle-mini-scanned", True)):
        config = Config(**sizes, use_scan=scan)
        inputs = inputs_of(config, text, codes)
        params, shapes = filled(Network(config), *inputs)
        logits = Network(config).apply({"params": params}, *inputs).logits
        write(
            f"seq2seq/{name}", params, shapes, text=text, codes=codes, logits=logits,
            config=json.dumps(config.to_dict(), default=str),
        )  # fmt: skip
    mini = {"encoder_ffn_dim": 2730, "decoder_ffn_dim": 2730}
    mega = {"d_model": 2048, "encoder_layers": 24, "decoder_layers": 24, "image_vocab_size": 16415}
    mega |= {"encoder_vocab_size": 50272}
    counts = {}
    for name, other in (("mini", mini), ("mega", mega)):
        config = Config(**other, use_scan=True, decoder_start_token_id=16384)
        inputs = inputs_of(config, jnp.zeros((1, 64), int), jnp.zeros((1, 256), int))
        drawn = jax.eval_shape(Network(config).init, jax.random.key(0), *inputs)
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(drawn))
    for folder in filter(None, (OUT, GOLDEN)):
        (folder / "seq2seq" / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(counts)


if __name__ == "__main__":
    sys.path.insert(0, str(PEERS / "flax"))
    for folder in filter(None, (OUT, GOLDEN)):
        (folder / "seq2seq").mkdir(parents=True, exist_ok=True)
    dalle_mini_vqgan()
    dalle_mini()
