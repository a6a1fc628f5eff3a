"""Captions as people type them, from the official names."""

import doctest

import pytest

from dalle_jax.data import paraphrase
from dalle_jax.data.paraphrase import (
    PER_RECORD,
    Paraphrased,
    in_other_words,
    official_names,
    with_article,
)


def record(name, style="twemoji", keywords=None, id="twemoji/1f622"):
    captions = [name, f"{name}, {style} style", f"a picture of {name}"]
    return {"id": id, "style": style, "captions": captions + ([keywords] if keywords else [])}


def test_the_examples_hold():
    assert doctest.testmod(paraphrase).failed == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("red apple", ["apple, red"]),
        ("gray heart", ["grey heart", "heart, gray"]),
        ("dog", []),
        ("face with tears", []),
        ("man running", ["male running", "guy running", "man jogging", "running, man"]),
    ],
)
def test_a_name_in_other_words(name, expected):
    assert in_other_words(name) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("apple", "an apple"),
        ("red heart", "a red heart"),
        ("clapping hands", "clapping hands"),
        ("glass", "a glass"),
        ("cat with tears", "a cat with tears"),
        ("apple, red", "an apple, red"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


def test_a_record_keeps_its_name_first_and_a_third_of_its_captions_are_name_and_style():
    source = Paraphrased([record("crying cat face", keywords="tears, sad")])
    captions = source[0]["captions"]
    assert captions[0] == "crying cat face"
    assert len(captions) == PER_RECORD
    assert captions.count("crying cat face, twemoji style") >= PER_RECORD // 3
    assert sum("twemoji" not in caption for caption in captions) >= PER_RECORD // 3
    assert any("tears, sad" in caption for caption in captions)
    assert len(set(captions)) > PER_RECORD // 3
    assert source[0] == source[0], "drawn by the record's id, so the same at every use"


def test_a_part_of_a_name_is_used_only_where_it_names_nothing_else():
    both = Paraphrased([record("dog face"), record("dog", id="twemoji/1f415")])
    alone = Paraphrased([record("dog face")])
    assert any("dog" in c and "face" not in c for c in alone[0]["captions"])
    assert all("face" in c for c in both[0]["captions"])


def test_a_record_of_two_names_uses_both():
    captions = ["sun", "star", "sun, twemoji style", "star, twemoji style", "a picture of sun"]
    two = {"id": "x", "style": "twemoji", "captions": captions}
    assert official_names(two) == ["sun", "star"]
    said = Paraphrased([two])[0]["captions"]
    assert {"sun, twemoji style", "star, twemoji style"} <= set(said)
