import json
import shutil

import numpy as np
import pytest
import tiny

import dalle_jax
from dalle_jax.generate import micro_batching
from dalle_jax.generate.clip_scorer import Clip, retrieval_accuracy
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.image.pixels import crop_center
from dalle_jax.text.bpe import Tokenizer


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, clip):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.clip(card="# Tiny\n", license="Do as you like.\n").save(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8, 3), np.uint8)


CAPTIONS = ["red apple", "blue heart", "crying cat", ""]


def test_features_have_length_one(clip, images):
    for features in (clip.encode_images(images[0]), clip.encode_texts(CAPTIONS[:3])):
        assert features.shape == (3, 6)
        assert features.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_score_is_the_cosine_of_each_image_and_its_own_caption(clip, images):
    scores = clip.score(CAPTIONS, images)
    seen = np.stack([clip.encode_images(row) for row in images])
    expected = (clip.encode_texts(CAPTIONS)[:, None] * seen).sum(-1)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.shape == (4, 3)
    assert np.abs(scores).max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="got 1 captions and 4 rows of images"):
        clip.score(["red apple"], images)


def test_images_of_any_size_are_cut_to_the_middle_square(clip, images):
    wide = np.concatenate(images[0], axis=1).repeat(3, axis=0).repeat(3, axis=1)
    features = clip.encode_images([crop_center(wide, 8), wide])
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)
    with pytest.raises(ValueError, match=r"got an image of float64 \[8, 8, 3\]; .* uint8"):
        clip.encode_images([np.zeros((8, 8, 3))])


def test_micro_batches_change_no_feature(clip, images, monkeypatch):
    flat = images.reshape(12, 8, 8, 3)[:5]
    whole = clip.encode_images(flat)
    monkeypatch.setattr(micro_batching, "LARGEST", 2)
    np.testing.assert_allclose(clip.encode_images(flat), whole, atol=1e-6)


def test_retrieval_counts_equal_captions_once_and_ties_as_wrong():
    texts = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    images = np.float32([[0, 1, 0], [1, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5]])
    found = retrieval_accuracy(images, texts, ["apple", "apple", "heart", "cat"])
    # The first image looks like a heart, and the last one like all three captions.
    # Nearest to "apple" is one of its two images; "heart" ties with the first; "cat" is nearest.
    assert found["image_to_text_1"] == 2 / 4
    assert found["text_to_image_1"] == pytest.approx(2 / 3)
    assert found["image_to_text_5"] == found["text_to_image_5"] == 1


def test_white_space_around_captions_does_not_count(clip):
    np.testing.assert_array_equal(
        clip.encode_texts([" red apple\n"]), clip.encode_texts(["red apple"])
    )


# The folder


def test_a_loaded_clip_equals_the_one_that_was_saved(clip, saved, images):
    loaded = dalle_jax.Clip.load(saved)
    np.testing.assert_array_equal(loaded.score(CAPTIONS, images), clip.score(CAPTIONS, images))
    assert (loaded.card, loaded.license) == ("# Tiny\n", "Do as you like.\n")
    assert {path.name for path in saved.iterdir()} == {
        *("config.json", "clip.safetensors", "tokenizer.model", "README.md", "LICENSE")
    }
    assert repr(loaded) == "Clip('tiny': 8 px, 0.0M parameters)"


def test_a_model_folder_carries_its_clip(clip, tmp_path, images):
    tiny.model().with_clip(clip).save(tmp_path / "model")
    inside = Clip.load(tmp_path / "model")
    model = dalle_jax.load(tmp_path / "model")
    model.save(tmp_path / "model")  # over itself
    for found in (inside, model.clip, dalle_jax.load(tmp_path / "model").clip):
        assert found.fingerprints == clip.fingerprints
    assert tiny.model().clip is None


def test_a_folder_without_a_clip_says_so(tmp_path):
    tiny.model().save(tmp_path / "model")
    with pytest.raises(ModelError, match="has no CLIP of its own; name the folder of another"):
        Clip.load(tmp_path / "model")
    with pytest.raises(ModelError, match="is neither a shipped model nor a folder"):
        Clip.load(tmp_path / "none")


def test_a_clip_is_not_taken_for_a_model_that_samples(saved):
    with pytest.raises(
        ModelError, match=r"holds a CLIP, which cannot sample; open it with Clip\.load"
    ):
        dalle_jax.load(saved)


def test_a_flipped_bit_or_another_tokenizer_is_noticed(copy):
    weights = copy / "clip.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="the clip of CLIP 'tiny' is damaged or not the one"):
        Clip.load(copy)
    weights.write_bytes(data[:-3])
    with pytest.raises(ModelError, match="cannot read the weights .*clip.safetensors: missing or"):
        Clip.load(copy)
    Tokenizer.train(["dog"], vocabulary=320).save(copy / "tokenizer.model")
    with pytest.raises(ModelError, match="missing or damaged|do not belong together"):
        Clip.load(copy)


def test_a_config_that_does_not_fit_is_refused(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"clip": config["clip"] | {"features": 7}}))
    with pytest.raises(ModelError, match="CLIP 'tiny' do not fit its config: image/projection/ker"):
        Clip.load(copy)
    del config["name"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks 'name'; restore it"):
        Clip.load(copy)


def test_the_shipped_clip_tells_colours_apart():
    clip = Clip.load("emoji")
    y, x = np.mgrid[:64, :64] - 31.5
    disc = (y**2 + x**2 < 28**2)[..., None]
    colours = {
        "red": (220, 50, 50),
        "orange": (240, 140, 40),
        "yellow": (250, 200, 60),
        "green": (110, 170, 80),
        "blue": (60, 120, 200),
        "purple": (150, 100, 190),
        "brown": (140, 90, 60),
        "black": (40, 40, 45),
    }
    discs = np.stack([np.where(disc, np.uint8(c), np.uint8(255)) for c in colours.values()])
    captions = [f"{name} circle" for name in colours]
    scores = clip.score(captions, np.stack([discs] * len(captions)))
    best = [captions[row] for row in np.argmax(scores, axis=0)]
    assert best == captions
    others = np.where(np.eye(len(captions), dtype=bool), -np.inf, scores).max(axis=0)
    assert (np.diag(scores) > others + 0.05).all()

    ranked = scores[:-1, :-1]  # "blue circle" would take the black disc
    assert (ranked.argmax(axis=1) == np.arange(len(ranked))).all()
    red, blue = captions.index("red circle"), captions.index("blue circle")
    assert scores[red, red] > scores[red, blue] + 0.2
    assert scores[blue, blue] > scores[blue, red]
