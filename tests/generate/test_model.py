import json
import os
import re
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from PIL import Image

import dalle_jax
from dalle_jax.generate import micro_batching, tensor_file
from dalle_jax.generate import model_folder as files
from dalle_jax.generate.micro_batching import micro_batches
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import ImageError, decode
from dalle_jax.models import dvae
from dalle_jax.models.dvae import DVAE
from dalle_jax.text.bpe import TextError, Tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model(card="# Tiny\n", license="Do as you like.\n").save(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, tiny.PX, tiny.PX, 3), np.uint8)


def write_png(path, array, mode=None):
    Image.fromarray(array, mode).save(path)
    return path


# Sampling


def test_generate_gives_n_images_a_caption(model):
    images = model.generate(["red apple", "blue heart"], n=3)
    assert images.shape == (2, 3, tiny.PX, tiny.PX, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images.reshape(6, -1)}) == 6


def test_one_caption_counts_as_a_list_of_one(model):
    np.testing.assert_array_equal(model.generate("red apple"), model.generate(["red apple"]))


def test_a_sample_depends_on_seed_caption_and_number_alone(model):
    together = model.generate(["red apple", "blue heart"], n=3, seed=7)
    np.testing.assert_array_equal(model.generate(["Blue heart"], n=2, seed=7)[0], together[1, :2])
    assert (model.generate(["Blue heart"], n=2, seed=8)[0] != together[1, :2]).any()


def test_micro_batches_change_nothing(model, monkeypatch):
    whole = model.generate(["red apple", "blue heart"], n=3)
    monkeypatch.setattr(micro_batching, "LARGEST", 2)
    reports = []
    parts = model.generate(
        ["red apple", "blue heart"], n=3, progress=lambda *counts: reports.append(counts)
    )
    np.testing.assert_array_equal(parts, whole)
    assert reports == [(2, 6), (4, 6), (5, 6), (6, 6)]  # both samples of a caption, or the last


@pytest.mark.parametrize("total", [1, 2, 5, 24, 31, 33, 512])
def test_micro_batches_cover_everything_once_in_one_shape(total):
    batches = list(micro_batches(total, bytes_each=1))
    assert len({len(batch) for batch, _ in batches}) == 1
    assert len(batches[0][0]) <= 32
    covered = np.unique(np.concatenate([batch for batch, _ in batches]))
    np.testing.assert_array_equal(covered, np.arange(total))
    assert sum(new for _, new in batches) == total
    assert sum(len(batch) for batch, _ in batches) < 1.5 * total + 1


def test_micro_batches_shrink_to_the_memory():
    assert {len(batch) for batch, _ in micro_batches(512, bytes_each=2**28)} == {4}
    assert {len(batch) for batch, _ in micro_batches(3, bytes_each=2**40)} == {1}


def test_temperature_zero_samples_the_likeliest_image_whatever_the_seed(model):
    greedy = SamplingConfig(temperature=0)
    first = model.generate("red apple", sampling=greedy, seed=0)
    np.testing.assert_array_equal(first, model.generate("red apple", sampling=greedy, seed=1))


@pytest.mark.parametrize("option", [{"guidance": 8.0}, {"top_k": 1}, {"top_p": 0.1}])
def test_every_option_of_sampling_reaches_the_decoder(model, option):
    sampling = SamplingConfig(**option)
    changed = model.generate("red apple", n=2, sampling=sampling)
    assert (model.generate("red apple", n=2) != changed).any()


@pytest.mark.parametrize(
    ("decoder", "option", "value", "as_trained"),
    [
        ("autoregressive", "guidance", 8, 1),
        ("progressive", "temperature", 0.1, 1),
        ("progressive", "revise", 2, 0),
    ],
)
def test_a_model_samples_as_it_recommends_unless_another_way_is_named(
    decoder, option, value, as_trained, tmp_path
):
    def images(model, **options):
        sampling = SamplingConfig(decoder=decoder, **options)
        return model.generate("red apple", n=2, sampling=sampling)

    plain = tiny.model(**tiny.progressive_parts())
    off, on = images(plain, **{option: as_trained}), images(plain, **{option: value})
    assert (off != on).any()
    np.testing.assert_array_equal(images(plain), off)
    recommended = SamplingConfig(**{option: value})
    tiny.model(**tiny.progressive_parts(), recommended=recommended).save(tmp_path / "m")
    recommending = Model.load(tmp_path / "m")
    np.testing.assert_array_equal(images(recommending), on)
    np.testing.assert_array_equal(images(recommending, **{option: as_trained}), off)
    one_by_one = recommending.as_recommended(SamplingConfig(decoder="autoregressive"))
    assert one_by_one.revise == 0  # which only the progressive decoder can do


def test_a_model_cannot_recommend_what_callers_do_not_leave_open(model, tmp_path):
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"sampling": {}', '"sampling": {"stages": 3}'))
    with pytest.raises(ModelError, match="recommends stages 3, but a model can recommend temper"):
        Model.load(tmp_path / "m")


def test_image_prompt_keeps_its_top_rows_of_codes(model, images, monkeypatch):
    decoded = []
    monkeypatch.setattr(model, "decode", lambda codes: decoded.append(codes) or images[:2])
    model.generate("red apple", n=2, image_prompt=images[0], keep_rows=3)
    wanted = model.encode(images[:1])[0]
    for codes in decoded[0]:
        np.testing.assert_array_equal(codes[:3], wanted[:3])


def test_image_prompt_may_be_any_image_file(model, tmp_path):
    rng = np.random.default_rng(0)
    clear = write_png(tmp_path / "alpha.png", rng.integers(0, 256, (40, 30, 4), np.uint8))
    deep = write_png(tmp_path / "deep.png", rng.integers(0, 65536, (20, 20)).astype(np.uint16))
    for path in (clear, str(deep)):
        images = model.generate("red apple", image_prompt=path, keep_rows=3)
        read = model.generate("red apple", image_prompt=decode(path), keep_rows=3)
        np.testing.assert_array_equal(images, read)


# Codes


def test_encode_cuts_images_of_any_size_to_the_middle_square(model, images):
    wide = np.concatenate([images[1], images[0], images[1]], axis=1)
    codes = model.encode([images[0], wide])
    assert codes.shape == (2, 4, 4)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes[0], codes[1])


def test_micro_batches_change_no_code(model, images, monkeypatch):
    whole = model.encode(images)
    monkeypatch.setattr(micro_batching, "LARGEST", 2)
    np.testing.assert_array_equal(model.encode(images), whole)
    assert model.decode(whole).shape == images.shape
    assert model.decode(whole[:0]).shape == (0, tiny.PX, tiny.PX, 3)


# The folder


def test_loaded_model_equals_the_one_that_was_saved(model, saved, images):
    loaded = dalle_jax.load(saved)
    np.testing.assert_array_equal(
        loaded.generate("red apple", n=2), model.generate("red apple", n=2)
    )
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))
    assert (loaded.name, loaded.card, loaded.license) == ("tiny", "# Tiny\n", "Do as you like.\n")
    assert loaded.fingerprints == model.fingerprints
    assert repr(loaded).startswith("Model('tiny': 16 px, 4 x 4 of 12 codes, prior of 0.0M")


def test_model_folder_holds_all_that_is_needed(saved):
    assert {path.name for path in saved.iterdir()} == {
        *("config.json", "dvae.safetensors", "prior.safetensors", "tokenizer.model"),
        *("README.md", "LICENSE"),
    }
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == 1
    assert config["prior"]["grid"] == 4
    assert set(config["fingerprints"]) == {"dvae", "prior", "tokenizer"}


def test_every_file_may_be_read_by_those_who_may_read_the_config(saved):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_only_kernels_away_from_codes_and_tokens_are_stored_in_bfloat16(saved):
    for file in ("prior", "dvae"):
        for name, tensor in tensor_file.read_tensors(saved / f"{file}.safetensors").items():
            rounded = name.endswith("kernel") and not name.startswith(
                ("head/", "encoder/output/", "decoder/input/")
            )
            assert tensor.dtype == ("bfloat16" if rounded else "float32"), name


def test_a_model_without_an_autoregressive_prior_says_how_it_takes_code_after_code():
    alone = tiny.model(prior=None, prior_params=None, **tiny.progressive_parts())
    said = "has no jacobi prior; its decoder is progressive; with order raster and stages 16 it"
    with pytest.raises(ModelError, match=said):
        alone.generate(["red apple"], sampling=SamplingConfig(decoder="jacobi"))


def test_dvae_alone_encodes_and_decodes_but_does_not_sample(tmp_path, images):
    alone = tiny.model(prior=None, prior_params=None, tokenizer=None)
    alone.save(tmp_path / "alone")
    loaded = dalle_jax.load(tmp_path / "alone")
    assert loaded.decode(loaded.encode(images)).shape == images.shape
    with pytest.raises(ModelError, match="'tiny' holds a dVAE alone: .* needs a prior"):
        loaded.generate("red apple")


def test_a_vqgan_takes_the_place_of_the_dvae(tmp_path, images):
    model = tiny.model(codec=tiny.VQGAN_CONFIG, codec_params=tiny.vqgan_params(3))
    model.save(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert names == {"vqgan.safetensors", "prior.safetensors"}
    loaded = dalle_jax.load(tmp_path / "model")
    assert loaded.codec == tiny.VQGAN_CONFIG
    codes, errors = model.codes_and_errors(images)
    chex.assert_shape((codes, errors), (len(images), 4, 4))
    assert errors.dtype == np.float16
    np.testing.assert_array_equal(loaded.encode(images), codes)
    np.testing.assert_array_equal(loaded.decode(codes), model.decode(codes))
    drawn = loaded.generate("red apple", seed=3)
    np.testing.assert_array_equal(drawn, model.generate("red apple", seed=3))
    tiny.model(codec=tiny.VQGAN_CONFIG, codec_params=tiny.vqgan_params(4)).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "vqgan.safetensors", tmp_path / "model")
    refused(tmp_path / "model", "the VQ-GAN of model 'tiny' is damaged or not the one it was train")


def test_errors_of_a_dvae_are_its_greatest_logits_negated(model, images):
    codes, errors = model.codes_and_errors(images)
    x = dvae.preprocess(jnp.asarray(images))
    logits = DVAE(model.codec).apply({"params": model.codec_params}, x, method="encode")
    np.testing.assert_array_equal(codes, logits.argmax(-1))
    np.testing.assert_allclose(errors, -logits.max(-1), rtol=1e-3, atol=1e-3)


def test_saving_replaces_a_model_and_leaves_nothing_else_behind(copy):
    tiny.model(name="new").save(copy)
    assert dalle_jax.load(copy).name == "new"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_failed_save_leaves_the_old_model(copy, monkeypatch):
    def fail(path, tensors):
        raise OSError("disk full")

    monkeypatch.setattr(tensor_file, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.model(name="new").save(copy)
    assert dalle_jax.load(copy).name == "tiny"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_files_that_a_user_put_into_the_folder_stay(copy):
    (copy / "notes" / "old").mkdir(parents=True)
    (copy / "notes" / "old" / "ideas.txt").write_text("mine")
    (copy / "clip").mkdir()
    (copy / "clip" / "scores.csv").write_text("mine too")
    (copy / "latest").symlink_to("notes")
    (copy / "vqgan.safetensors").touch()  # of a model that was here before
    tiny.model(name="new").save(copy)
    tiny.model(name="newer").save(copy)
    assert dalle_jax.load(copy).name == "newer"
    assert (copy / "latest" / "old" / "ideas.txt").read_text() == "mine"
    assert (copy / "clip" / "scores.csv").read_text() == "mine too"
    assert not (copy / "vqgan.safetensors").exists()


class Renames:
    """Stands in for os.replace, and fails at those calls of it that are listed."""

    def __init__(self, monkeypatch, *failing, error):
        self.calls, self.failing, self.error = 0, failing, error
        self.replace = os.replace
        monkeypatch.setattr(files.os, "replace", self)

    def __call__(self, source, target):
        self.calls += 1
        if self.calls in self.failing:
            raise self.error
        self.replace(source, target)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_stops_between_two_renames_leaves_the_old_model(
    copy, monkeypatch, failing, error
):
    (copy / "notes.txt").write_text("mine")
    Renames(monkeypatch, failing, error=error)
    with pytest.raises(type(error)):
        tiny.model(name="new").save(copy)
    assert dalle_jax.load(copy).name == "tiny"
    assert (copy / "notes.txt").read_text() == "mine"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_models_that_cannot_be_put_in_their_place_are_both_there_and_named(copy, monkeypatch):
    Renames(monkeypatch, 2, 3, error=OSError(5, "Input/output error"))
    with pytest.raises(ModelError, match="could not be replaced .* move one of them back"):
        tiny.model(name="new").save(copy)
    [workplace] = copy.parent.iterdir()
    assert dalle_jax.load(workplace / "old").name == "tiny"
    assert dalle_jax.load(workplace / "new").name == "new"
    refused(
        copy, f"saving {copy} was cut short; the model that was there is in {workplace / 'old'}"
    )


def test_saving_through_a_symbolic_link_replaces_the_folder_behind_it(copy):
    link = copy.parent / "link"
    link.symlink_to("copy")
    tiny.model(name="new").save(link)
    assert link.is_symlink()
    assert dalle_jax.load(copy).name == "new"


def test_a_weights_file_is_the_librarys_to_the_byte(tmp_path):
    tensors = tensor_file.to_tensors(tiny.parts()["prior_params"])
    tensor_file.write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(tensors)


def test_bfloat16_halves_the_kernels_and_is_saved_as_float32_is(tmp_path):
    half, whole = tiny.model(dtype="bfloat16"), tiny.model()
    assert half.fingerprints == whole.fingerprints
    kernels = [m.priors["prior"][1]["layers"]["qkv"]["kernel"] for m in (half, whole)]
    assert 2 * kernels[0].nbytes == kernels[1].nbytes
    half.save(tmp_path / "half")
    assert Model.load(tmp_path / "half").fingerprints == whole.fingerprints
    assert half.generate("sky", n=2).shape == (1, 2, tiny.PX, tiny.PX, 3)


def test_float32_kernels_are_rounded_to_bfloat16_when_they_are_loaded_so(tmp_path):
    tiny.model(kernels="float32").save(tmp_path / "whole")
    half, whole = (Model.load(tmp_path / "whole", dtype=x) for x in ("bfloat16", "float32"))
    kernels = [m.priors["prior"][1]["layers"]["qkv"]["kernel"] for m in (half, whole)]
    assert kernels[0].dtype == "bfloat16" and kernels[1].dtype == "float32"
    np.testing.assert_array_equal(kernels[0], kernels[1].astype("bfloat16"))
    assert half.priors["prior"][1]["head"]["image"]["kernel"].dtype == "float32"
    assert half.fingerprints == whole.fingerprints
    with pytest.raises(ModelError, match="stored in float32 and is in memory in bfloat16"):
        half.save(tmp_path / "half")


def test_each_tensor_of_a_file_is_read_once_to_load_it(saved, monkeypatch):
    read, reader = [], tensor_file._read_tensor
    monkeypatch.setattr(
        tensor_file,
        "_read_tensor",
        lambda path, name: read.append((path, name)) or reader(path, name),
    )
    model = Model.load(saved)
    parts = [model.codec_params, model.priors["prior"][1]]
    assert len(read) == len(set(read)) == len(jax.tree.leaves(parts))


def test_a_new_model_takes_over_the_other_prior_of_an_old_one_for_the_same_codes(tmp_path):
    tiny.model(**tiny.progressive_parts()).save(tmp_path / "old")
    tiny.model().save(tmp_path / "new")
    files.copy_other_priors(tmp_path / "old", tmp_path / "new")
    both = Model.load(tmp_path / "new")
    assert both.fingerprints == tiny.model(**tiny.progressive_parts()).fingerprints

    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["fingerprints"]["dvae"] = "another"
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    tiny.model(name="third").save(tmp_path / "third")
    files.copy_other_priors(tmp_path / "old", tmp_path / "third")
    assert list(Model.load(tmp_path / "third").priors) == ["prior"]


def test_saving_over_other_files_is_refused(tmp_path, model):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="holds other files; choose a new folder"):
        model.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_importing_the_package_does_not_import_jax():
    code = "import sys, dalle_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What does not belong, or is damaged


def refused(folder, message):
    with pytest.raises(ModelError, match=message) as caught:
        dalle_jax.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["emoji", "people"])
def test_a_shipped_model_is_whole_and_says_where_it_is_from(name):
    model = dalle_jax.load(name)
    assert model.fingerprints.keys() == {"vqgan", "prior", "progressive", "tokenizer"}
    sizes = [path.stat().st_size for path in (files.SHIPPED / name).rglob("*") if path.is_file()]
    assert sum(sizes) <= 40 * 2**20
    assert "Twemoji graphics, Copyright Twitter, Inc. and other contributors" in model.card
    assert "Creative Commons" in model.license
    model.tokenizer.encode(
        (files.SHIPPED / name / files.CAPTIONS).read_text().splitlines(),
        length=next(iter(model.priors.values()))[0].text_length - 1,
        overlong="error",
    )


def test_a_prior_of_version_0_1_opens_and_its_masked_progressive_prior_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["prior"]["style"] = "autoregressive"
    (copy / "config.json").write_text(json.dumps(config))
    assert list(dalle_jax.load(copy).priors) == ["prior"]
    config["progressive"] = config["prior"] | {"style": "progressive"}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "describes a progressive prior of version 0.1, which this version cannot run")


def test_unknown_model_name_lists_the_shipped_ones(tmp_path, monkeypatch):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "config.json").write_text("{}")
    monkeypatch.setattr(files, "SHIPPED", tmp_path)
    refused("emojy", "'emojy' is neither a shipped model nor a folder; shipped models: emoji")
    refused(tmp_path, r"has no config.json; shipped models: emoji")


def test_tokenizer_that_does_not_belong_is_refused(copy):
    Tokenizer.train(["dog"], vocabulary=320).save(copy / "tokenizer.model")
    refused(copy, "made for text vocabulary .*, but the tokenizer has .*do not belong together")


def test_tokenizer_of_the_same_size_that_does_not_belong_is_refused(copy):
    data = tiny.tokenizer().to_bytes()
    assert data.count(b"apple") == 1
    (copy / "tokenizer.model").write_bytes(data.replace(b"apple", b"elppa"))
    refused(copy, "the tokenizer of model 'tiny' is not the one it was trained with .*put the orig")


def test_dvae_that_does_not_belong_is_refused(copy):
    other = tiny.model(codec_params=tiny.dvae_params(5))
    other.save(copy.parent / "other")
    shutil.copy(copy.parent / "other" / "dvae.safetensors", copy)
    refused(copy, "the dVAE of model 'tiny' is damaged or not the one it was trained with")


def test_flipped_bit_in_the_prior_is_noticed(copy):
    path = copy / "prior.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    refused(copy, "the prior of model 'tiny' is damaged .*put the original file back")


@pytest.mark.parametrize("name", ["dvae.safetensors", "prior.safetensors"])
def test_truncated_or_missing_weights_are_refused(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-3])
    refused(copy, f"cannot read the weights .*{name}: missing or damaged")
    path.unlink()
    refused(copy, f"cannot read the weights .*{name}: missing or damaged")


def test_missing_tokenizer_is_refused(copy):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(TextError, match=r"cannot read the tokenizer .*tokenizer\.model"):
        dalle_jax.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, but this dalle_jax reads format 1"),
        ({"dvae": {"depth": 3}}, "does not describe a DVAEConfig of this version: .*depth"),
        ({"px": 18}, "px is 18, but must be a multiple of 4"),
        ({"px": 32}, "made for grid 4, but the dVAE has 8; they do not belong together"),
    ],
)
def test_config_that_does_not_fit_is_refused(copy, change, message):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(copy, message)


def test_damaged_config_is_refused(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    del config["px"]
    path.write_text(json.dumps(config))
    refused(copy, "config.json lacks 'px'; restore it")
    path.write_text('{"form')
    refused(copy, "config.json is damaged")


def test_weights_of_other_sizes_are_refused():
    config = tiny.DVAE_CONFIG.__class__(
        width=8, groups=3, blocks_per_group=1, codes=12, code_width=16
    )
    with pytest.raises(ModelError, match=r"dVAE do not fit its config: decoder/.* has shape \("):
        tiny.model(codec=config)


def test_prior_without_tokenizer_is_refused():
    with pytest.raises(ModelError, match="has a prior but no tokenizer"):
        tiny.model(tokenizer=None)


def test_a_caption_that_is_too_long_is_cut_as_in_training_and_the_log_says_so(model, caplog):
    fits = "red apple " * 12
    assert len(model.tokenizer.encode([fits], length=63)[0]) == 63
    long = fits + "crying cat " * 30
    images = model.generate([long, long + "blue"], seed=5)
    assert images.shape[:2] == (2, 1)
    assert "tokens, but only 63 fit: truncated" in caplog.text


@pytest.mark.parametrize("prompt", ["red apple\n", " red apple", "\tRed Apple \r\n"])
def test_prompts_are_read_as_training_captions_are(model, prompt):
    wanted = model.generate("red apple", seed=3)
    np.testing.assert_array_equal(model.generate(prompt, seed=3), wanted)


# Bad requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": []}, "no caption was given"),
        ({"prompts": ["red apple", "  "]}, "caption 2 of 2 is empty; describe an image"),
        ({"n": 0}, "n is 0; at least 1"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"sampling": SamplingConfig(top_k=13)}, r"top_k is 13, but must lie in 1\.\.12"),
        ({"sampling": SamplingConfig(stages=2)}, "stages is 2, but only the progressive decoder"),
        ({"keep_rows": 2}, "keep_rows is 2, but no image prompt was given"),
    ],
)
def test_bad_request_is_refused_in_one_sentence(model, request_, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**({"prompts": "red apple"} | request_))


@pytest.mark.parametrize("keep_rows", [-1, 0, 4, 9])
def test_rows_to_keep_must_lie_within_the_grid(model, images, keep_rows):
    with pytest.raises(ValueError, match=f"keep_rows is {keep_rows}; .* 1 to 3, since the grid"):
        model.generate("red apple", image_prompt=images[0], keep_rows=keep_rows)


def test_unusable_image_prompt_is_refused(model, tmp_path):
    dot = write_png(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    cut = write_png(tmp_path / "cut.png", np.zeros((99, 99, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[:80])
    for path, message in ((dot, "1x1 pixels, .* at least 4"), (cut, "damaged or truncated")):
        with pytest.raises(ImageError, match=f"{re.escape(path.name)}: {message}"):
            model.generate("red apple", image_prompt=path, keep_rows=1)
    with pytest.raises(FileNotFoundError):
        model.generate("red apple", image_prompt=tmp_path / "none.png", keep_rows=1)


def test_images_and_codes_of_the_wrong_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"got an image of float64 \[16, 16, 3\]; .* uint8"):
        model.encode([np.zeros((16, 16, 3))])
    with pytest.raises(ValueError, match="codes go from 0 to 12, but the codebook holds 0 to 11"):
        model.decode(np.arange(16).reshape(1, 4, 4) % 13)


def test_model_class_is_reached_from_the_package():
    assert dalle_jax.Model is Model
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        _ = dalle_jax.Modell
