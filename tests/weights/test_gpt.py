"""minDALL-E's transformer gives what its authors' code gave: golden/weights/gpt."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe

from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.generate.joint_sampler import ImageSpec, sample_jointly
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import gpt_prior, vqgan
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights import sources
from dalle_jax.weights.torch_write import write_torch

GOLDEN = Path(__file__).parent.parent / "golden" / "weights"
WANTED = np.load(GOLDEN / "gpt" / "mindalle.npz")
CODES = 24


def published(folder, *, without=(), **changed):
    """The files of the peer with the recipe's weights; changed are shapes of tensors."""
    shapes = json.loads(str(WANTED["shapes"])) | changed
    state = {k: recipe.weights(k, tuple(s)) for k, s in shapes.items() if k not in without}
    write_torch(folder / "stage2_last.ckpt", {"state_dict": state})
    vocabulary = {piece: i for i, piece in enumerate(recipe.PIECES)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(["#version: 0.2", *recipe.MERGES, ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return [folder / name for name in ("stage2_last.ckpt", "vocab.json", "merges.txt")]


def imported(folder):
    files = published(folder)
    source, config, tensors = sources.open_source("mindalle", files, codes=CODES)
    found = sources.convert(source, config, tensors, files)
    return config, jax.tree.map(jnp.asarray, found.params), found.tokenizer


forward = jax.jit(gpt_prior.forward, static_argnums=0)


def apart(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def test_tokens_and_logits_are_those_of_the_peer(tmp_path):
    config, params, tokenizer = imported(tmp_path)
    sizes = (config.width, config.depth, config.heads, config.text_slots, config.grid, config.pad)
    assert sizes == (128, 2, 2, 20, 4, 1)
    text = tokenizer.encode(recipe.CAPTIONS, length=config.text_slots)
    np.testing.assert_array_equal(np.where(text < config.text_vocabulary, text, 1), WANTED["text"])
    codes = jnp.asarray(WANTED["codes"], jnp.int32)
    found = forward(config, params, jnp.asarray(text[:2]), codes)
    for logits, name in zip(found, ("text_logits", "code_logits"), strict=True):
        assert apart(logits, WANTED[name]) < 1e-5
        np.testing.assert_array_equal(logits.argmax(-1), WANTED[name].argmax(-1))


def test_cached_decode_equals_full_forward_for_several_images_of_a_caption(tmp_path):
    config, params, _ = imported(tmp_path)
    text = jnp.asarray(WANTED["text"][:2], jnp.int32)
    codes = np.random.RandomState(1).randint(0, CODES, (4, config.image_length)).astype(np.int32)
    _, full = forward(config, params, jnp.repeat(text, 2, axis=0), jnp.asarray(codes))
    captions = gpt_prior.encode(config, params, text)
    step = jax.jit(gpt_prior.decode_step, static_argnums=0)
    cache, previous = gpt_prior.init_cache(config, 4), jnp.full(4, 7)
    for position in range(config.image_length):
        found, cache = step(config, params, captions, cache, previous, jnp.int32(position))
        np.testing.assert_allclose(found, full[:, position], atol=2e-5)
        previous = jnp.asarray(codes[:, position])


def test_bfloat16_kernels_give_nearly_the_same_logits_with_and_without_a_cache(tmp_path):
    config, params, _ = imported(tmp_path)
    text, codes = (jnp.asarray(WANTED[name][:2], jnp.int32) for name in ("text", "codes"))
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == "kernel" else x, params
    )
    _, logits = forward(config, rounded, text, codes)
    captions = gpt_prior.encode(config, rounded, text)
    cache, none = gpt_prior.init_cache(config, 2), jnp.zeros(2, jnp.int32)
    first, _ = gpt_prior.decode_step(config, rounded, captions, cache, none, jnp.int32(0))
    for found in (logits, first[:, None]):
        assert found.dtype == jnp.float32
        assert 1e-4 < apart(found, WANTED["code_logits"][:, : found.shape[1]]) < 3e-2


def test_the_published_size_is_that_which_the_peer_counts():
    counts = json.loads((GOLDEN / "counts.json").read_text())
    shapes = sources.shapes(GPTConfig(pad=0))
    assert sum(map(math.prod, shapes.values())) == counts["mindalle"] == 1_291_081_728


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.2.ln1.weight": [128]}, "nothing in the files for our layers/attention_norm/bias"),
        ({"head_img.bias": [24]}, "no rule for head_img.bias"),
        ({"without": ("blocks.1.mlp.2.bias",)}, "nothing in the files for our layers/mlp_out/bias"),
        ({"blocks.0.attn.key.weight": [128, 64]}, "of another shape or type: blocks.0.attn.key"),
        ({"pos_emb_img.weight": [15, 128]}, "15 rows, which is no square"),
        ({"tok_emb_img.weight": [25, 128]}, "25 rows, but the codec has 24 codes"),
        ({"tok_emb_txt.weight": [96, 96]}, "width is 96, but must be a multiple of 64"),
        ({"tok_emb_txt.weight": [40, 128]}, "no number below 40"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_names(change, said, tmp_path):
    files = published(tmp_path, **change)
    with pytest.raises(UserError, match=said):
        source, config, tensors = sources.open_source("mindalle", files, codes=CODES)
        sources.convert(source, config, tensors, files)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pad": 16384}, "pad is 16384, but must be a token below 16384"),
        ({"pad": -1}, "pad is -1"),
        ({"pad": 0, "heads": 5}, "multiple of its 5 heads"),
        ({"pad": 0, "depth": 0}, "depth is 0; it must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(UserError, match=said):
        GPTConfig(**sizes)


def test_an_imported_model_generates_the_codes_of_the_peer(tmp_path, capsys):
    sizes = {"width": 4, "multipliers": (1, 1), "blocks_per_group": 1, "attention": ()}
    codec = VQGANConfig(**sizes, z_width=4, codes=CODES, code_width=4)
    codec_params = vqgan.init_params(codec, jax.random.key(0))
    saved = Model(name="v", px=8, codec=codec, codec_params=codec_params, kernels="float32")
    saved.save(tmp_path / "vqgan")
    files, half = [*map(str, published(tmp_path))], tmp_path / "half"
    codec_and_out = ["--codec", str(tmp_path / "vqgan"), "--out", str(tmp_path / "mindalle")]
    main(["import", "mindalle", *files, *codec_and_out])
    assert "parameters" in capsys.readouterr().out

    model = Model.load(tmp_path / "mindalle")
    assert "CC-BY-NC-SA-4.0" in model.license and "Codec" in model.card
    captions = recipe.CAPTIONS[:2]
    images = model.generate(captions, n=2, sampling=SamplingConfig(top_k=1))
    for image, codes in zip(images, WANTED["greedy"], strict=False):
        expected = model.decode(codes.reshape(1, 4, 4))[0]
        np.testing.assert_array_equal(image, np.stack([expected] * 2))
    main(
        [
            "import",
            "mindalle",
            *files,
            *codec_and_out[:2],
            "--out",
            str(half),
            "--dtype",
            "bfloat16",
        ]
    )
    sizes = [(x / "gpt.safetensors").stat().st_size for x in (half, tmp_path / "mindalle")]
    assert sizes[0] < 0.7 * sizes[1] and Model.load(half).kernels == "bfloat16"
    config, params = model.priors["gpt"]
    specs, guided = [ImageSpec(captions[0], 0, 0)], SamplingConfig(temperature=0, guidance=3)
    (grids,) = sample_jointly(config, params, model.tokenizer, specs, sampling=guided)
    ids = jnp.asarray(model.tokenizer.encode([captions[0], ""], length=20))
    codes = np.zeros((2, 16), np.int32)
    for position in range(16):
        c, u = np.asarray(forward(config, params, ids, jnp.asarray(codes))[1])
        codes[:, position] = (u + 3 * (c - u))[position].argmax()
    np.testing.assert_array_equal(grids.reshape(-1), codes[0])
