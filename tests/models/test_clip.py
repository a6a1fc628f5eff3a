"""The contrastive model against a small one of transformers, and its own rules."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.clip import CLIP, CLIPConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "clip.npz"
CONFIG = CLIPConfig(
    px=8,
    patch=4,
    image_width=12,
    image_depth=2,
    image_heads=3,
    text_width=8,
    text_depth=2,
    text_heads=2,
    text_vocabulary=20,
    text_length=6,
    features=6,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def norm(weights, name):
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def tower(weights, name, heads, depth=2):
    """A transformer of the package transformers, its layers stacked as ours are."""

    def linear(i, part, shape=None):
        where = f"{name}.encoder.layers.{i}.{part}"
        kernel, bias = weights[f"{where}.weight"].T, weights[f"{where}.bias"]
        return {"kernel": kernel.reshape(shape or kernel.shape), "bias": bias}

    def layer(i):
        parts = [linear(i, f"self_attn.{x}_proj") for x in "qkv"]
        kernel, bias = (np.stack([p[x] for p in parts], axis=-2) for x in ("kernel", "bias"))
        D = len(kernel)
        split = (3, heads, D // heads)
        out = (heads, D // heads, D)
        return {
            "attention_norm": norm(weights, f"{name}.encoder.layers.{i}.layer_norm1"),
            "qkv": {"kernel": kernel.reshape(D, *split), "bias": bias.reshape(split)},
            "attention_out": linear(i, "self_attn.out_proj", out),
            "mlp_norm": norm(weights, f"{name}.encoder.layers.{i}.layer_norm2"),
            "mlp_in": linear(i, "mlp.fc1"),
            "mlp_out": linear(i, "mlp.fc2"),
        }

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(depth)))


@pytest.fixture(scope="module")
def params(golden):
    w = golden
    seen, read = "vision_model.embeddings.", "text_model.embeddings."
    patch = w[f"{seen}patch_embedding.weight"].transpose(2, 3, 1, 0)
    return {
        "image": {
            "patch": {"kernel": patch.reshape(-1, patch.shape[-1])},
            "class": w[f"{seen}class_embedding"],
            "position": w[f"{seen}position_embedding.weight"],
            "first_norm": norm(w, "vision_model.pre_layrnorm"),
            "layers": tower(w, "vision_model", 3),
            "last_norm": norm(w, "vision_model.post_layernorm"),
            "projection": {"kernel": w["visual_projection.weight"].T},
        },
        "text": {
            "token": w[f"{read}token_embedding.weight"],
            "position": w[f"{read}position_embedding.weight"],
            "layers": tower(w, "text_model", 2),
            "last_norm": norm(w, "text_model.final_layer_norm"),
            "projection": {"kernel": w["text_projection.weight"].T},
        },
        "log_scale": w["logit_scale"],
    }


def test_features_equal_those_of_transformers(golden, params):
    images, text, scale = jax.jit(CLIP(CONFIG).apply)(
        {"params": params}, golden["images"], golden["text"]
    )
    np.testing.assert_allclose(images, golden["image_features"], atol=1e-5)
    np.testing.assert_allclose(text, golden["text_features"], atol=1e-5)
    np.testing.assert_allclose(scale, np.exp(golden["logit_scale"]), rtol=1e-6)


def test_parameters_are_laid_out_as_they_are_declared(params):
    drawn = shapes(CONFIG)
    chex.assert_trees_all_equal_shapes(params, drawn)


def test_vit_b_32_has_the_published_number_of_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(CLIPConfig()))) == 151_277_313


def test_what_stands_behind_the_end_of_a_caption_does_not_matter(params):
    model = CLIP(CONFIG).bind({"params": params})
    pads = 20 + np.arange(4)
    text = jnp.array([[3, 5, *pads[2:]], [3, 5, 20, 7], [3, 5, 7, 7], pads])
    first, second, longer, empty = model.encode_text(text)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - longer).max() > 0.1
    assert np.abs(first - empty).max() > 0.1


def test_a_fresh_model_gives_vectors_of_length_one_and_the_papers_temperature(key):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    (image, text, scale), _ = jax.jit(CLIP(CONFIG).init_with_output)(
        key, images, rng.integers(0, 20, (2, 4))
    )
    np.testing.assert_allclose(jnp.linalg.norm(image, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(text, axis=1), 1, rtol=1e-5)
    assert float(scale) == pytest.approx(1 / 0.07, rel=1e-5)


def test_sizes_that_do_not_fit_are_refused(params):
    model = CLIP(CONFIG).bind({"params": params})
    with pytest.raises(ValueError, match="images of side 4, but this model reads images of 8"):
        model.encode_images(jnp.zeros((1, 4, 4, 3), jnp.uint8))
    with pytest.raises(ValueError, match="got 5 caption slots, but text_length 6 needs 4"):
        model.encode_text(jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"px \(=10\) must be a multiple of patch \(=4\)"):
        CLIPConfig(px=10, patch=4)
    with pytest.raises(ValueError, match="text_length is 2, but must be at least 3"):
        CLIPConfig(text_length=2)


def shapes(config):
    images = jax.ShapeDtypeStruct((1, config.px, config.px, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((1, config.slots), jnp.int32)
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), images, text)["params"]
