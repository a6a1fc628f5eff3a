import math

import numpy as np
import pytest

from dalle_jax.evaluate import composition
from dalle_jax.evaluate.composition import Case

CASES = [
    Case(
        id="a",
        family="style",
        held_out=True,
        caption="red apple, flat",
        alternatives={"style": ("red apple, drawn",), "concept": ("pear, flat", "plum, flat")},
    ),
    Case(
        id="b",
        family="style",
        held_out=False,
        caption="pear, flat",
        alternatives={"style": ("pear, drawn",)},
    ),
]
# one direction for each caption
AXES = {
    "red apple, flat": [1, 0, 0, 0, 0, 0],
    "red apple, drawn": [0, 1, 0, 0, 0, 0],
    "pear, flat": [0, 0, 1, 0, 0, 0],
    "plum, flat": [0, 0, 0, 1, 0, 0],
    "pear, drawn": [0, 0, 0, 0, 1, 0],
}


def texts(captions):
    return np.asarray([AXES[caption] for caption in captions], float)


class Colours:
    """A judge whose features of an image are those that its first pixel names."""

    def encode_texts(self, captions):
        return texts(captions)

    def encode_images(self, images):
        return np.eye(6)[images[:, 0, 0, 0]]


def images(*features):
    return np.asarray(features, np.uint8)[..., None, None, None] * np.ones((2, 2, 3), np.uint8)


def test_the_right_caption_has_to_rank_first_in_each_axis_and_ties_are_wrong():
    features = np.zeros((2, 3, 6))
    features[0, 0] = [1, 0.5, 0.5, 0.5, 0, 0]
    features[0, 1] = [1, 1, 0, 0, 0, 0]  # a tie in style
    features[0, 2] = [1, 0, 0, 2, 0, 0]  # a plum
    features[1] = [0, 0, 1, 0, 0, 0]
    found = composition.verdicts(CASES, features, texts)
    np.testing.assert_array_equal(found["style"], [[1, 0, 1], [1, 1, 1]])
    np.testing.assert_array_equal(found["concept"], [[1, 1, 0], [np.nan] * 3])
    np.testing.assert_array_equal(found["all"], [[1, 0, 0], [1, 1, 1]])


def test_a_judge_that_cannot_tell_is_never_right():
    found = composition.verdicts(CASES, np.ones((2, 1, 6)), lambda c: np.ones((len(c), 6)))
    assert not np.nansum(found["all"])


def test_chance_is_one_over_the_captions_of_an_axis():
    assert composition.chance(CASES) == {
        "style": pytest.approx(1 / 2),
        "concept": pytest.approx(1 / 3),
        "all": pytest.approx((1 / 6 + 1 / 2) / 2),
    }


def close(found, similarity, composed, beyond):
    wanted = {"similarity": similarity, "composed": composed, "beyond memory": beyond}
    assert {name: float(value.item()) for name, value in found.items()} == pytest.approx(wanted)


def test_a_copy_of_a_training_image_is_no_composition():
    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    truth, training, nobody = np.asarray([at(0)]), np.asarray([at(40), at(200)]), np.asarray([-1])

    def near(*images):
        return composition.nearness(np.asarray([images]), truth, training, nobody)

    close(near(at(40)), math.cos(math.radians(40)), 0, 0)  # a copy
    close(near(at(25)), math.cos(math.radians(25)), 0, 1)  # nearer to memory than to the truth
    close(near(at(15)), math.cos(math.radians(15)), 1, 1)
    close(near(at(-60)), 0.5, 1, 0)  # far from all, as noise is
    close(near(at(40), at(0)), 1, 1, 1)  # the best counts


def test_the_own_image_of_a_seen_case_is_left_out():
    truth = np.asarray([[1.0, 0]])
    training = np.asarray([[1.0, 0], [0.6, 0.8]])
    close(composition.nearness(truth[None], truth, training, np.asarray([0])), 1, 1, 1)


def test_the_nearest_caption_shares_the_rarest_words():
    captions = [
        ["an image of a pear", "pear, flat"],
        ["an image of a red apple", "red apple, drawn"],
        ["red car, flat"],
        ["blue car, flat"],
    ]
    wanted = ["red apple, flat", "blue pear, flat", "zebra"]
    found = composition.nearest_captions(wanted, captions)
    assert found.tolist() == [1, 0, 0]


def test_the_interval_samples_whole_cases_again():
    certain = np.ones((5, 3))
    assert composition.interval(certain) == (1, 1, 1)
    halves = np.repeat([[1.0], [0.0]], 50, axis=0).repeat(100, axis=1)  # 100 images of each case
    mean, low, high = composition.interval(halves)
    assert mean == 0.5
    # of 100 cases, not of 10,000 images: 1.96 * sqrt(0.25 / 100) = 0.098
    assert low == pytest.approx(0.402, abs=0.02)
    assert high == pytest.approx(0.598, abs=0.02)
    assert composition.interval(halves) == (mean, low, high)
    assert math.isnan(composition.interval(np.full((3, 2), np.nan))[0])


def test_the_table_has_all_kinds_of_images_with_their_numbers():
    rows = composition.table(
        CASES,
        images([0, 3], [2, 2]),  # an apple and a plum; two pears
        truth=images(0, 2),
        reconstructions=images(0, 4),  # the tokenizer spoils the pear's style
        training=images(2, 1),
        ids=["b", "c"],
        captions=[["pear, flat"], ["red apple, drawn"]],
        judge=Colours(),
    )
    assert [(row.held_out, row.images) for row in rows] == [
        (True, "samples"),
        (True, "nearest caption"),
        (True, "reconstructions"),
        (True, "true"),
        (False, "samples"),
        (False, "reconstructions"),
        (False, "true"),
    ]
    means = [{name: value[0] for name, value in row.values.items()} for row in rows]
    near = {"similarity": 1, "composed": 1, "beyond memory": 1}
    far = dict.fromkeys(near, 0)
    assert means == [
        {"style": 0.5, "concept": 0.5, "all": 0.5} | near,
        {"style": 0, "concept": 0, "all": 0} | far,
        {"style": 1, "concept": 1, "all": 1} | near,
        {"style": 1, "concept": 1, "all": 1},
        {"style": 1, "all": 1} | near,
        {"style": 0, "all": 0} | far,
        {"style": 1, "all": 1},
    ]
