"""From files of others to folders of ours, and back."""

import json

import jax
import numpy as np
import pytest
import recipe

from dalle_jax.cli import main
from dalle_jax.generate import model_folder as files
from dalle_jax.generate import tensor_file
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.models import codec as codecs
from dalle_jax.models.clip import CLIP, CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.text.clip_bpe import CLIPTokenizer
from dalle_jax.text.tokenizer_file import load_tokenizer
from dalle_jax.train.all_stages import open_codec
from dalle_jax.weights import sources
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.export import write_codec
from dalle_jax.weights.torch_write import write_torch

DVAE = DVAEConfig(width=8, groups=4, blocks_per_group=1, codes=12, code_width=8)
WIDE = {"width": 128, "multipliers": (1,), "blocks_per_group": 1, "attention": (1,)}
SMALL = {"z_width": 8, "codes": 4, "code_width": 8}


def params_of(config):
    """Random numbers everywhere."""
    return {name: recipe.weights(name, shape) for name, shape in sources.shapes(config).items()}


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("openai-dvae", DVAE),
        ("taming-vqgan", VQGANConfig(**WIDE, **SMALL)),
        ("taming-vqgan", VQGANConfig(**WIDE, **SMALL, quantizer="logits")),
    ],
)
def test_out_and_in_again_is_the_same_bit_for_bit(layout, config, tmp_path):
    arrays = params_of(config)
    written = write_codec(layout, config, arrays, tmp_path / "new.ckpt")
    source, found, tensors = sources.open_source(layout, written)
    assert found == config
    back = tensor_file.flatten_params(sources.convert(source, found, tensors, written).params)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    ("layout", "config", "said"),
    [
        ("openai-dvae", DVAEConfig(groups=3), "needs 4 groups, and not 3"),
        ("openai-dvae", DVAEConfig(residual_gain=0.3), "residual_gain of 0.015625, and not 0.3"),
        ("openai-dvae", VQGANConfig(), "is not for this model's VQ-GAN"),
        ("taming-vqgan", VQGANConfig(width=32), "at least 128 channels everywhere, and not 32"),
        ("taming-vqgan", VQGANConfig(patch=4, attention=()), "a patch of 1, and not 4"),
        ("taming-vqgan", VQGANConfig(quantizer="cosine"), "not by cosine"),
        ("taming-vqgan", VQGANConfig(unit_pixels=True), r"and not in \[0, 1\]"),
    ],
)
def test_what_others_code_cannot_run_is_not_written(layout, config, said, tmp_path):
    with pytest.raises(WeightsError, match=said):
        write_codec(layout, config, {}, tmp_path / "new.ckpt")


def test_an_imported_codec_is_a_model_folder_and_makes_codes_for_experiments(tmp_path, capsys):
    halves = write_codec("openai-dvae", DVAE, params_of(DVAE), tmp_path / "encoder.pkl")
    out = tmp_path / "dvae"
    command = ["import", "openai-dvae", *map(str, halves), "--out", str(out), "--px", "16"]
    main(command)
    assert "parameters" in capsys.readouterr().out
    model = Model.load(out)
    assert (model.px, model.codec, model.kernels) == (16, DVAE, "float32")
    for name, array in tensor_file.flatten_params(model.codec_params).items():
        np.testing.assert_array_equal(array, params_of(DVAE)[name])
    for said in ("cdn.openai.com/dall-e/encoder.pkl", "- dvae: dVAE of DALL-E", "encoder.pkl: "):
        assert said in model.card
    assert "Modified MIT" in model.license
    tokens = open_codec(str(out), tmp_path / "run")
    assert tokens.codec_fingerprint == model.codec_fingerprint
    main(["export", str(out), "openai-dvae", "--out", str(tmp_path / "again.ckpt")])
    again = [tmp_path / "again.ckpt", tmp_path / "again-decoder.ckpt"]
    theirs = sources.open_source("openai-dvae", again)[2]
    for name, tensor in sources.open_source("openai-dvae", halves)[2].items():
        np.testing.assert_array_equal(theirs[name], tensor)


def test_what_is_wrong_with_the_files_is_said_in_one_sentence(tmp_path, capsys):
    write_torch(tmp_path / "odd.pt", {"a": np.zeros(2, np.float32)})
    for source, given, said in (
        ("openai", ["odd.pt"], "the source is 'openai', but must be one of openai-dvae"),
        ("openai-dvae", ["odd.pt"], "needs the files encoder.pkl, decoder.pkl, in this order"),
        ("llamagen-vq", ["none.pt"], "published at https://huggingface.co/FoundationVision"),
        ("maskgit-vqgan", ["odd.pt"], "its tensor encoder.conv_in.weight is missing"),
        ("hf-clip", ["odd.pt", "odd.pt"], "is missing, wanted 4 axes; is it a CLIP"),
    ):
        paths = [str(tmp_path / name) for name in given]
        with pytest.raises(SystemExit, match="2"):
            main(["import", source, *paths, "--out", str(tmp_path / "out")])
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


def test_a_clip_with_others_tokenizer_is_saved_and_opened(tmp_path):
    (tmp_path / "merges.txt").write_text("#version\n" + "\n".join(recipe.MERGES), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_merges(tmp_path / "merges.txt")
    config = CLIPConfig(
        px=8, patch=4, image_width=8, image_depth=1, image_heads=2, text_width=8, text_depth=1,
        text_heads=2, text_vocabulary=tokenizer.vocabulary, text_length=20, features=4,
    )  # fmt: skip
    params = CLIP(config).init(jax.random.key(0), method=lambda clip: clip.log_scale)["params"]
    clip = Clip(name="c", config=config, params=params, tokenizer=tokenizer, kernels="float32")
    clip.save(tmp_path / "clip")
    opened = Clip.load(tmp_path / "clip")
    assert opened.fingerprints == clip.fingerprints
    np.testing.assert_array_equal(opened.encode_texts(["the cat"]), clip.encode_texts(["the cat"]))


def test_words_are_merged_as_the_list_says(tmp_path):
    tokenizer = CLIPTokenizer([tuple(line.split(" ")) for line in recipe.MERGES])
    (ids,) = tokenizer.encode(["The cat's 12 ca"], length=12)
    pieces = [tokenizer._texts[i] for i in ids if i < tokenizer.vocabulary]
    assert pieces == ["the</w>", "cat</w>", "'", "s</w>", "1</w>", "2</w>", "c", "a</w>"]
    assert list(ids[8:]) == [tokenizer.vocabulary + i for i in range(8, 12)]
    assert tokenizer.decode(ids) == "the cat 's 1 2 ca"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("data", ['{"kind": "x"}', '{"kind": "clip", "merges": ["a"]}', "{"])
def test_a_damaged_tokenizer_is_named(data, tmp_path):
    (tmp_path / "tokenizer.model").write_text(data)
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer.model: .*damaged"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_lists_name_every_source_and_package(capsys):
    main(["models"])
    said = capsys.readouterr().out
    for name, source in sources.SOURCES.items():
        assert name in said and source.licence in said and source.addresses[0] in said
    main(["doctor"])
    said = capsys.readouterr().out
    assert f"jax {jax.__version__}" in said and "(cpu)" in said


def test_kinds_of_codecs_have_files_of_their_own():
    assert files.CODECS.keys() == codecs.KINDS.keys()
    assert json.dumps(list(files.CODECS.values())).count(".safetensors") == len(codecs.KINDS)
