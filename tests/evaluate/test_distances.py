"""Golden numbers: torch-fidelity 0.4.0 and pytorch-fid 0.3.0 on the features of `sets`."""

import tracemalloc

import numpy as np
import pytest

from dalle_jax.evaluate import distances
from dalle_jax.evaluate.distances import (
    Moments,
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24))
    real = rng.normal(size=(300, 24)) @ mix
    drawn = rng.normal(size=(260, 24)) @ (mix + 0.3 * rng.normal(size=(24, 24))) + 0.5
    logits = 3 * rng.normal(size=(205, 12))
    return real, drawn, logits


def test_frechet_distance_equals_both_references(sets):
    real, drawn, _ = map(Moments.of, sets)
    assert frechet_distance(real, drawn) == pytest.approx(50.27206635837706, rel=1e-9)


def test_frechet_distance_of_singular_covariances_equals_the_reference(sets):
    few = [Moments.of(features[:count]) for features, count in zip(sets[:2], (15, 18), strict=True)]
    assert frechet_distance(*few) == pytest.approx(442.87840112621745, rel=1e-6)


def test_with_equal_covariances_only_the_means_count(sets):
    real = sets[0]
    moved = real + np.arange(24)[None]
    distance = frechet_distance(Moments.of(real), Moments.of(moved))
    assert distance == pytest.approx(sum(i**2 for i in range(24)), rel=1e-9)
    assert frechet_distance(Moments.of(real), Moments.of(real)) == pytest.approx(0, abs=1e-9)
    flat = Moments.of(np.ones((5, 3)))
    assert frechet_distance(flat, flat) == 0


def test_moments_do_not_depend_on_how_the_images_come(sets):
    shifted = sets[0] + 1e6  # where a sum of squares would lose half of its digits
    parts = Moments(24)
    for part in np.split(shifted, [1, 7, 100]):
        parts.add(part)
    assert parts.count == 300
    np.testing.assert_allclose(parts.mean, shifted.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(sets[0], rowvar=False), atol=1e-6)
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        _ = Moments.of(sets[0][:1]).covariance


def test_kernel_distance_of_subsets_equals_the_reference(sets):
    mean, deviation = kernel_distance_of_subsets(*sets[:2], subsets=7, size=200, seed=3)
    assert mean == pytest.approx(71.48607979853445, rel=1e-9)
    assert deviation == pytest.approx(29.516372144302565, rel=1e-9)
    with pytest.raises(ValueError, match="subsets of 1000 needs as many images, got 260"):
        kernel_distance_of_subsets(*sets[:2])


def test_kernel_distance_follows_its_definition_in_blocks(sets, monkeypatch):
    x, y = sets[0][:5], sets[1][:4]

    def k(a, b):
        return (a @ b / 24 + 1) ** 3

    within = [np.mean([k(a, b) for a in s for b in s if a is not b]) for s in map(list, (x, y))]
    expected = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    for block in (2, 2048):
        monkeypatch.setattr(distances, "_BLOCK", block)
        assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_halves_of_one_set_is_zero_on_average():
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.normal(size=(2, 20, 8))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert min(found) < 0


def test_inception_score_equals_the_reference(sets):
    mean, deviation = inception_score(sets[2])
    assert (mean, deviation) == pytest.approx((3.8344596530094663, 0.29481900060721106), rel=1e-9)
    assert inception_score(sets[2], splits=1)[0] == pytest.approx(4.166441478612471, rel=1e-9)
    with pytest.raises(ValueError, match="a score over 10 splits needs as many images, got 9"):
        inception_score(sets[2][:9])


def test_inception_score_is_the_number_of_classes_at_best():
    sure = 1000.0 * np.eye(4)[np.arange(8) % 4]
    assert inception_score(sure, splits=1) == pytest.approx((4, 0))
    assert inception_score(np.zeros((8, 4)), splits=2) == pytest.approx((1, 0))


def test_precision_and_recall_equal_the_reference(sets, monkeypatch):
    for block in (64, 2048):
        monkeypatch.setattr(distances, "_BLOCK", block)
        found = precision_recall(*sets[:2])
        assert found == pytest.approx((0.7346153855323792, 0.7866666913032532), abs=1e-6)
    with pytest.raises(ValueError, match="3 neighbours need more images than that, got 3"):
        precision_recall(sets[0], sets[1][:3])


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", 100)
    x = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    tracemalloc.start()
    try:
        for measure in (precision_recall, kernel_distance, lambda x, y: inception_score(x)):
            measure(x, x)
        kernel_distance_of_subsets(x, x, subsets=50, size=500)
        assert tracemalloc.get_traced_memory()[1] < 10**6  # a table of all would take 32 MB
    finally:
        tracemalloc.stop()


def test_a_copied_corner_is_precise_but_recalls_little():
    real = np.arange(10.0)[:, None]
    assert precision_recall(real, real[:4] + 0.01, neighbours=1) == (1.0, 0.5)


def test_clip_score_is_a_hundred_times_the_mean_cosine_above_zero():
    images = np.array([[1.0, 0], [0, 2], [1, 0]])
    texts = np.array([[3.0, 0], [1, 1], [-1, 0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + np.sqrt(0.5)) / 3)
