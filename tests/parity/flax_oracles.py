"""Runs others' own flax code on small networks with random weights, in our environment.

    python flax_oracles.py PEERS OUT [GOLDEN]

Writes what `oracles.py` writes of networks in PyTorch. Their packages need a transformers that
has no flax any more; its two classes that hold settings and weights are stood in for.
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


class Config:
    """In place of transformers.PretrainedConfig."""

    def __init__(self, **options):
        pass


def stand_in():
    """Makes `import transformers` give what the peers need of it here."""
    package, utils = types.ModuleType("transformers"), types.ModuleType("modeling_flax_utils")
    package.PretrainedConfig, utils.FlaxPreTrainedModel = Config, object
    sys.modules |= {"transformers": package, "transformers.modeling_flax_utils": utils}


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


if __name__ == "__main__":
    stand_in()
    OUT.mkdir(parents=True, exist_ok=True)
    dalle_mini_vqgan()
