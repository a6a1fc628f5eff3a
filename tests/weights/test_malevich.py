"""ruDALL-E's transformer gives what its authors' code gave: golden/weights/gpt/malevich-*."""

import json
import math
from pathlib import Path

import compare
import jax
import numpy as np
import pytest
import recipe

from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import gpt_prior, vqgan
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.masks import attention_mask, window_mask
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights import sources
from dalle_jax.weights.torch_write import write_torch

GOLDEN = Path(__file__).parent.parent / "golden" / "weights" / "gpt"
VERSIONS = {"malevich": "malevich-v3", "malevich-v2": "malevich-v2"}


def golden(source):
    return np.load(GOLDEN / f"{VERSIONS[source]}.npz")


def published(source, folder, *, without=(), extra=None, **changed):
    """The files of the peer with the recipe's weights; changed are shapes of tensors."""
    wanted = golden(source)
    shapes = json.loads(str(wanted["shapes"])) | changed
    state = {k: recipe.weights(k, tuple(s)) for k, s in shapes.items() if k not in without}
    write_torch(folder / "pytorch_model.bin", state | (extra or {}))
    (folder / "bpe.model").write_text(str(wanted["bpe_model"]))
    return [folder / "pytorch_model.bin", folder / "bpe.model"]


def masks_of(version):
    mask = attention_mask("dense", text_length=12, grid=8)
    mask[12:, 12:] = window_mask(grid=8, wraps=version == "malevich-v2")
    return {"transformer.conv_mask": mask.astype(np.float32)}


@pytest.mark.parametrize("source", VERSIONS)
def test_tokens_logits_and_likeliest_codes_are_those_of_the_peer(source, tmp_path):
    files = published(source, tmp_path, extra=masks_of(VERSIONS[source]))
    found = compare.differences(source, files, golden(source))
    assert compare.within(found), found
    assert max(found.values()) < 1e-5


def test_published_sizes_are_those_that_the_peer_counts():
    counts = json.loads((GOLDEN / "malevich-counts.json").read_text())
    sizes = {"text_vocabulary": 16384, "text_slots": 128, "grid": 32, "codes": 8192}
    malevich = GPTConfig(variant="malevich-v3", width=2048, depth=24, heads=16, **sizes)
    kandinsky = GPTConfig(variant="malevich-v3", width=3840, depth=64, heads=60, **sizes)
    for name, config in (("Malevich", malevich), ("Kandinsky", kandinsky)):
        assert sum(map(math.prod, sources.shapes(config).values())) == counts[name]
    assert counts["Malevich"] == 1_310_410_880


def test_the_last_layer_is_a_window_unless_a_column_comes_there():
    sizes = {"width": 8, "heads": 1, "text_vocabulary": 9, "text_slots": 4, "grid": 3, "codes": 5}
    for depth, kinds in ((2, [0, 1]), (4, [0, 1, 0, 2]), (6, [0, 1, 0, 0, 0, 1])):
        config = GPTConfig(variant="malevich-v3", depth=depth, **sizes)
        masks, of_layer = gpt_prior._image_masks(config)
        assert masks.shape == (3, 9, 9)
        assert of_layer.tolist() == kinds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer.layers.5.input_layernorm.weight": [256]}, "numbered from 0 on"),
        ({"to_logits.2.bias": [24]}, "no rule for to_logits.2.bias"),
        ({"without": ("to_logits.1.bias",)}, "to_logits.1.bias is missing, wanted 1 axes"),
        ({"to_logits.1.weight": [165, 256]}, "to_logits.1.image.weight has shape"),
        ({"image_col_embeddings.weight": [7, 256]}, "another shape or type: image_col_embeddings"),
        ({"image_embeddings.weight": [25, 256]}, "25 rows, but the codec has 24 codes"),
        ({"text_embeddings.weight": [142, 96]}, "width is 96, but must be a multiple of 128"),
        # the tokenizer is looked at first: the head, which does not fit either, takes memory
        ({"text_embeddings.weight": [140, 256]}, "has 130 pieces, but the prior has rows for 128"),
        ({"extra": masks_of("malevich-v2")}, "its masks are those of malevich-v2; import it as"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_names(change, said, tmp_path):
    files = published("malevich", tmp_path, **change)
    with pytest.raises(UserError, match=said):
        source, config, tensors = sources.open_source("malevich", files, codes=24)
        sources.convert(source, config, tensors, files)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"variant": "malevich-v3", "pad": 0}, "pad is 0, but Malevich has one for each slot"),
        ({}, "pad is None, but must be a token below 16384"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(UserError, match=said):
        GPTConfig(**sizes)


def test_an_imported_model_generates_the_codes_of_the_peer(tmp_path):
    sizes = {"width": 4, "multipliers": (1, 1), "blocks_per_group": 1, "attention": ()}
    codec = VQGANConfig(**sizes, z_width=4, codes=24, code_width=4, wavelets=True)
    codec_params = vqgan.init_params(codec, jax.random.key(0))
    saved = Model(name="v", px=32, codec=codec, codec_params=codec_params, kernels="float32")
    saved.save(tmp_path / "vqgan")
    files, out = map(str, published("malevich", tmp_path)), ["--out", str(tmp_path / "malevich")]
    main(["import", "malevich", *files, "--codec", str(tmp_path / "vqgan"), *out])

    model = Model.load(tmp_path / "malevich")
    assert (model.px, model.grid) == (32, 8) and "Malevich" in model.card
    caption, wanted = recipe.RUSSIAN[0], golden("malevich")["greedy"][0].reshape(1, 8, 8)
    images = model.generate([caption], n=2, sampling=SamplingConfig(top_k=1))
    np.testing.assert_array_equal(images[0], np.stack([model.decode(wanted)[0]] * 2))

    config, _ = model.priors["gpt"]
    np.testing.assert_array_equal(
        gpt_prior.empty_caption(config), model.tokenizer.encode([""], length=12)
    )


def test_the_sides_of_published_images_make_the_grid_of_the_prior():
    f8 = {"multipliers": (1, 1, 2, 4), "attention": (8,), "codes": 8192, "quantizer": "logits"}
    for name, wavelets in (("malevich-vqgan", False), ("malevich-dwt", True)):
        assert sources.SOURCES[name].px == 32 * VQGANConfig(**f8, wavelets=wavelets).factor
