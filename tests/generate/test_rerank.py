import numpy as np
import pytest
import tiny

from dalle_jax.generate import micro_batching
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.rerank import Ranked, RunningBest

CAPTIONS = ["red apple", "blue heart"]


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture(scope="module")
def model(clip):
    return tiny.model().with_clip(clip)


@pytest.fixture(scope="module")
def everything(model):
    return model.generate(CAPTIONS, n=7, seed=5)


def best_of(images, scores, keep):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    rows = np.arange(len(images))[:, None]
    return images[rows, order], scores[rows, order]


@pytest.mark.parametrize("largest", [32, 2])
def test_kept_images_are_those_of_ranking_all_at_once(
    model, clip, everything, largest, monkeypatch
):
    expected, scores = best_of(everything, clip.score(CAPTIONS, everything), 3)
    monkeypatch.setattr(micro_batching, "LARGEST", largest)
    ranked = model.rank(CAPTIONS, n=7, seed=5, keep=3)
    assert isinstance(ranked, Ranked)
    np.testing.assert_array_equal(ranked.images, expected)
    np.testing.assert_allclose(ranked.scores, scores, atol=1e-6)


def test_another_clip_chooses_others(model, clip, everything):
    other = tiny.clip(params=tiny.clip_params(clip.config, 3))
    expected, scores = best_of(everything, other.score(CAPTIONS, everything), 2)
    ranked = model.rank(CAPTIONS, n=7, seed=5, keep=2, clip=other)
    np.testing.assert_array_equal(ranked.images, expected)
    np.testing.assert_allclose(ranked.scores, scores, atol=1e-6)
    assert (ranked.images != model.rank(CAPTIONS, n=7, seed=5, keep=2).images).any()


def test_of_equally_good_images_the_first_is_kept(clip):
    image, other = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    best = RunningBest(["red apple"], keep=2, px=8, clip=clip)
    best.add(np.array([0]), np.stack([image, other])[None])
    first = best.ranked()
    best.add(np.array([0]), np.stack([other, image])[None])
    top = first.images[0, 0]
    np.testing.assert_array_equal(best.ranked().images[0], [top, top])
    assert best.ranked().scores[0, 0] == first.scores[0, 0]


def test_only_what_is_kept_is_in_memory(model, monkeypatch):
    monkeypatch.setattr(micro_batching, "LARGEST", 2)
    largest = []
    empty = np.empty

    def watched(shape, *args):
        largest.append(np.prod(shape))
        return empty(shape, *args)

    monkeypatch.setattr(np, "empty", watched)
    model.rank("red apple", n=12, keep=1)
    assert max(largest) <= 2 * tiny.PX**2 * 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"n": 4, "keep": 5}, "keep is 5; it must be 1 to 4, the images per caption"),
        ({"n": 4, "keep": 0}, "keep is 0; it must be 1 to 4"),
    ],
)
def test_a_bad_request_is_refused(model, request_, message):
    with pytest.raises(ValueError, match=message):
        model.rank("red apple", **request_)


def test_a_model_without_a_clip_cannot_choose():
    with pytest.raises(ModelError, match="has no CLIP to rank images with; give another as"):
        tiny.model().rank("red apple", n=2, keep=1)
