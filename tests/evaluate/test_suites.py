import json
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dalle_jax.data.own_images import own_splits
from dalle_jax.data.sources import SourceError
from dalle_jax.data.tfds_source import PreparedSource
from dalle_jax.evaluate import suites
from dalle_jax.evaluate.suites import open_suite
from dalle_jax.image.pixels import encode_png

ROWS = {
    "a.png": ["red apple", "an apple"],
    "b.png": ["blue heart"],
    "c.png": ["red apple", "a fruit"],
}


def shade(i):
    return np.full((20, 30, 3), 60 * i, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    for i, name in enumerate(ROWS):
        (path / name).write_bytes(encode_png(shade(i)))
    lines = [json.dumps({"image": name, "captions": texts}) for name, texts in ROWS.items()]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def pairs(suite):
    return sorted(zip(suite.captions, suite.truth, strict=True))


def test_a_folder_is_asked_for_the_first_caption_of_each_image(folder):
    suite = open_suite("folder", data=folder)
    assert pairs(suite) == [("blue heart", 1), ("red apple", 0), ("red apple", 2)]
    assert suite.real == (0, 1, 2)
    assert set(suite.families) == {"all"}
    assert pairs(suite.head(2)) == sorted(zip(suite.captions[:2], suite.truth[:2], strict=True))
    assert suite.head(None) == suite
    images = suite.images([2, 0], 16)
    assert images.shape == (2, 16, 16, 3)
    assert (images[0] == 120).all()


def test_a_suite_holds_no_images_in_memory(monkeypatch):
    class Large:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            return {"image": bytes(10**6), "captions": [f"image {index}"], "style": "plain"}

    monkeypatch.setattr(suites, "open_emoji", lambda split, px: Large())
    tracemalloc.start()
    try:
        suite = open_suite("emoji")
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    finally:
        tracemalloc.stop()
    assert len(suite.captions) == 50


def test_coco_samples_captions_at_random_and_cub_takes_each_once(folder, monkeypatch):
    assert suites.COCO_CAPTIONS == 30_000
    everything = [(text, i) for i, texts in enumerate(ROWS.values()) for text in texts]
    assert pairs(open_suite("coco", data=folder)) == sorted(everything)
    monkeypatch.setattr(suites, "COCO_CAPTIONS", 3)
    drawn = [open_suite("coco", data=folder, seed=seed) for seed in (0, 0, 1)]
    assert len(set(drawn[0].truth)) <= len(drawn[0].captions) == 3
    assert drawn[0].captions == drawn[1].captions
    assert len(drawn[0].real) == 3
    once = [("a fruit", 2), ("an apple", 0), ("blue heart", 1), ("red apple", 0)]
    assert pairs(open_suite("cub", data=folder)) == once


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet", {}, "there is no suite 'imagenet'; choose from emoji, coco, cub, folder"),
        ("coco", {}, "suite coco needs --data: the folder that holds its images"),
        ("emoji", {"data": "x"}, "the emoji need no --data"),
    ],
)
def test_what_is_missing_is_named(name, options, message):
    with pytest.raises(SourceError, match=message):
        open_suite(name, **options)


class Captioned(tfds.core.GeneratorBasedBuilder):
    """A set as COCO's captions are prepared."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i, texts in enumerate(ROWS.values()):
            captions = [{"id": j, "text": text} for j, text in enumerate(texts)]
            yield i, {"image": encode_png(shade(i)), "captions": captions}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds.disable_progress_bar()
    builder = Captioned(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder.data_path


def test_a_prepared_set_gives_the_same_suite_as_a_folder(folder, prepared):
    suite = open_suite("coco", data=prepared)
    captions = [record["captions"] for record in (suite.source[i] for i in range(3))]
    assert sorted(captions) == sorted(ROWS.values())
    assert sorted(suite.captions) == sorted(open_suite("coco", data=folder).captions)
    for caption, record in zip(suite.captions, suite.truth, strict=True):
        assert caption in suite.source[record]["captions"]
    assert {int(p.max()) for p in suite.images(range(3), 16)} == {0, 60, 120}


def test_an_unknown_split_of_a_prepared_set_is_named(prepared):
    with pytest.raises(SourceError, match="has no split 'test'; choose from validation"):
        PreparedSource(prepared, "test")
    with pytest.raises(SourceError, match="has the splits validation, but training needs train"):
        own_splits(prepared)
