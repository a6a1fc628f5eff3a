import itertools

import numpy as np
import tiny

from dalle_jax.evaluate.drawing import Sampling
from dalle_jax.evaluate.kept import Kept
from dalle_jax.evaluate.retrieval import is_nearest, retrieval_study
from dalle_jax.image.pixels import encode_png

_greys = itertools.count(10, 20)


def record(split, style, name):
    """Every image is of another grey."""
    grey = np.full((tiny.PX, tiny.PX, 3), next(_greys), np.uint8)
    return {
        "id": f"{style}/{name}",
        "image": encode_png(grey),
        "style": style,
        "captions": [name, f"{name}, {style} style"],
    }


SPLITS = {
    split: [record(split, style, name) for style in ("openmoji", "twemoji") for name in names]
    for split, names in {
        "train": ("apple", "pear"),
        "heldout_cell": ("man cook",),
        "heldout_style": ("dog",),
        "validation": ("comb",),
    }.items()
}


def test_the_nearest_true_image_decides():
    def greys(*levels):
        return np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])

    true, own = greys(10, 60, 200), np.array([0, 2])
    images = np.stack([greys(34, 36), greys(255, 129)])  # 35 is half way from 10 to 60
    assert is_nearest(images, true, own).tolist() == [[True, False], [True, False]]


def test_blocks_do_not_change_who_is_nearest():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (150, 4, 4, 3), np.uint8)
    noisy = np.clip(true.astype(int) + rng.integers(-20, 21, true.shape), 0, 255).astype(np.uint8)
    assert is_nearest(noisy[:, None], true, np.arange(150)).all()
    assert not is_nearest(noisy[:, None], true, np.roll(np.arange(150), 1)).any()


class Darkest:
    """A judge to whom the darkest image of any caption is the best."""

    def images(self, images):
        return -images.mean((1, 2))

    def texts(self, captions):
        return np.ones((len(captions), 3))


def study(monkeypatch, samples, reranker=None):
    """Runs the study as if each caption gave the same samples, of these greys."""
    images = np.stack([np.full((tiny.PX, tiny.PX, 3), grey, np.uint8) for grey in samples])

    def generate(self, prompts, **_):
        return images[None].repeat(len(prompts), axis=0)

    monkeypatch.setattr(type(tiny.model()), "generate", generate)
    done = []
    rows = retrieval_study(
        tiny.model(),
        SPLITS.get,
        sampling=Sampling(),
        n=len(samples),
        captions=None,
        seed=0,
        kept=Kept(None),
        reranker=reranker,
        progress=lambda *counts: done.append(counts),
    )
    return rows, done


def test_the_study_asks_for_one_style_and_says_what_retrieval_would_reach(monkeypatch):
    rows, done = study(monkeypatch, samples=(0,))
    assert done[-1] == (4, 4)
    assert [(row["captions"], row["images"]) for row in rows] == [
        ("2 seen", "sampled"),
        ("2 seen", "decoded"),
        ("1 held-out cell", "sampled"),
        ("1 held-out cell", "decoded"),
        ("1 held-out cell", "nearest caption"),
        ("1 held-out style", "sampled"),
        ("1 held-out style", "decoded"),
        ("1 held-out style", "nearest caption"),
    ]
    assert all(row["right"] == [0, 0, 0] for row in rows if row["images"] == "nearest caption")


def test_the_best_of_n_is_the_one_that_the_reranker_scores_highest(monkeypatch):
    apple = SPLITS["train"][2]  # the first of twemoji's, grey 50
    monkeypatch.setitem(SPLITS, "train", [apple])
    rows, _ = study(monkeypatch, samples=(255, 50), reranker=Darkest())
    right = {row["images"]: row["right"][0] for row in rows if row["captions"] == "1 seen"}
    assert right["sampled"] == 0.5, "of two samples the second is right"
    assert right["best of 2"] == 1
