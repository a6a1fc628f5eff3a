"""Which parameters of each model are matrices of its layers."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from dalle_jax.models import autoregressive_prior, dvae, layers, progressive_prior, vqgan
from dalle_jax.models.clip import CLIP
from dalle_jax.models.dvae import DVAE
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.models.vqgan import VQGAN


def found(init, matrices, *inputs):
    """Shapes of parameters by path, in which inputs, outputs and what counts them stand apart."""
    params = jax.eval_shape(init, jax.random.key(0), *inputs)
    taken = {}

    def take(path, leaf, axes):
        if axes is not None:
            inputs, outputs = axes
            counting = [i for i in range(leaf.ndim) if i not in inputs + outputs]
            parts = (counting, inputs, outputs)
            shapes = tuple(tuple(leaf.shape[i] for i in part) for part in parts)
            taken[jax.tree_util.keystr(path, simple=True, separator="/")] = shapes

    jax.tree_util.tree_map_with_path(take, params, matrices(params))
    return taken


def stack(start, depth, width, heads):
    D, N, H, F = width, heads, width // heads, 4 * width
    return {
        f"{start}layers/qkv/kernel": ((depth, 3), (D,), (N, H)),
        f"{start}layers/attention_out/kernel": ((depth,), (N, H), (D,)),
        f"{start}layers/mlp_in/kernel": ((depth,), (D,), (F,)),
        f"{start}layers/mlp_out/kernel": ((depth,), (F,), (D,)),
    }


@pytest.mark.parametrize("parts", [tiny.parts, tiny.progressive_parts])
def test_those_of_a_prior_are_the_kernels_of_its_layers(parts):
    c = parts().get("prior") or parts()["progressive"]
    module = progressive_prior if isinstance(c, ProgressiveConfig) else autoregressive_prior
    assert found(lambda key: module.init_params(c, key), layers.matrices) == stack(
        "", c.depth, c.width, c.heads
    )


def test_those_of_a_clip_are_the_kernels_of_both_stacks():
    c = tiny.clip_parts()["config"]
    images = jnp.zeros((1, c.px, c.px, 3), jnp.uint8)
    text = jnp.zeros((1, c.slots), jnp.int32)
    init = CLIP(c).init
    taken = found(lambda *x: init(*x)["params"], layers.matrices, images, text)
    assert taken == stack("image/", c.image_depth, c.image_width, c.image_heads) | stack(
        "text/", c.text_depth, c.text_width, c.text_heads
    )


@pytest.mark.parametrize(
    ("module", "matrices", "kernel", "shapes", "left_out"),
    [
        (
            DVAE(tiny.DVAE_CONFIG),
            dvae.matrices,
            "encoder/group_3_block_1/conv_4/kernel",
            ((), (1, 1, 8), (32,)),
            {"encoder/input", "encoder/output", "decoder/input", "decoder/output"},
        ),
        (
            VQGAN(tiny.VQGAN_CONFIG),
            vqgan.matrices,
            "decoder/up_1/upsample/conv/kernel",
            ((), (3, 3, 4), (4,)),
            {f"{half}/{end}" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")}
            | {"quant_conv", "post_quant_conv"},
        ),
    ],
)
def test_those_of_a_codec_are_its_convolutions_but_for_its_ends(
    module, matrices, kernel, shapes, left_out
):
    images = jnp.zeros((1, tiny.PX, tiny.PX, 3))

    def init(key, images):
        return module.init(key, images)["params"]

    taken = found(init, matrices, images)
    assert taken[kernel] == shapes
    params = jax.eval_shape(init, jax.random.key(0), images)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    assert kernels - set(taken) == {f"{name}/kernel" for name in left_out}
