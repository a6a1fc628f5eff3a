import itertools

import numpy as np
import pytest
import tiny

from dalle_jax.evaluate import retrieval
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.evaluate.retrieval import nearest, retrieval_study
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import decode, encode_png

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

    images = np.stack([greys(34, 36), greys(255, 131)])  # 35 is half way from 10 to 60
    assert nearest(images, greys(10, 60, 200)).tolist() == [[0, 1], [2, 2]]


def test_blocks_do_not_change_which_is_nearest():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (150, 4, 4, 3), np.uint8)
    noisy = np.clip(true.astype(int) + rng.integers(-20, 21, true.shape), 0, 255).astype(np.uint8)
    assert nearest(noisy[:, None], true)[:, 0].tolist() == list(range(150))


class Darkest:
    """A judge to whom the darkest image of any caption is the best."""

    def encode_images(self, images):
        return -images.mean((1, 2))

    def encode_texts(self, captions):
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
        sampling=SamplingConfig(),
        n=len(samples),
        captions=None,
        seed=0,
        cache=ResultCache(None),
        reranker=reranker,
        progress=lambda *counts: done.append(counts),
    )
    return rows, done


def test_the_study_asks_for_one_style_and_says_what_retrieval_would_reach(monkeypatch):
    rows, done = study(monkeypatch, samples=(0,))
    assert done[-1] == (104, 104)
    assert [(row["captions"], row["images"]) for row in rows] == [
        ("2 seen", "samples"),
        ("2 seen", "reconstructions"),
        ("1 held-out cell", "samples"),
        ("1 held-out cell", "reconstructions"),
        ("1 held-out cell", "nearest caption"),
        ("1 held-out style", "samples"),
        ("1 held-out style", "reconstructions"),
        ("1 held-out style", "nearest caption"),
        ("100 free-form", "samples"),
        ("100 free-form", "nearest caption"),
    ]
    retrieved = [row["right"][0] for row in rows if row["images"] == "nearest caption"]
    assert retrieved == [0, 0, 0]


def test_the_best_of_n_is_the_one_that_the_reranker_scores_highest(monkeypatch):
    apple = SPLITS["train"][2]  # the first of twemoji's, grey 50
    monkeypatch.setitem(SPLITS, "train", [apple])
    rows, _ = study(monkeypatch, samples=(255, 50), reranker=Darkest())
    right = {row["images"]: row["right"][0] for row in rows if row["captions"] == "1 seen"}
    assert right["samples"] == 0.5, "of two samples the second is right"
    assert right["best of 2"] == 1


@pytest.mark.parametrize("style", ["openmoji", "twemoji"])
def test_free_form_captions_are_right_in_either_style(style, monkeypatch, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("caption,names\na fine pear,pear|comb\nhound,dog\n", encoding="utf-8")
    monkeypatch.setattr(retrieval, "FREE_FORM", table)
    pear = next(r for r in SPLITS["train"] if r["id"] == f"{style}/pear")
    rows, _ = study(monkeypatch, samples=(int(decode(pear["image"])[0, 0, 0]),))
    shares = {(row["captions"], row["images"]): row["right"][0] for row in rows}
    assert shares["2 free-form", "samples"] == 0.5
