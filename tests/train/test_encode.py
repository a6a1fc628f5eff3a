"""Codes and reconstructed images: made once, and anew when what they were made of has changed."""

import io
import threading

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from dalle_jax.data import code_shards
from dalle_jax.data.batches import batches, one_epoch
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.data.sources import FolderSource, SourceError
from dalle_jax.train import encode
from dalle_jax.train.encode import EncodedBatches, Encoder, cached_codes, cached_reconstructions


@pytest.fixture(scope="module")
def tokens():
    return tiny.model(prior=None, prior_params=None, tokenizer=None)


@pytest.fixture(scope="module")
def source():
    return ShapesSource("validation", px=tiny.PX)


@pytest.fixture
def images(tmp_path):
    """A folder of five images with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        write_image(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text(f"image {i}\n")
    return folder


def write_image(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (tiny.PX, tiny.PX, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    path.write_bytes(file.getvalue())


@pytest.fixture
def made(monkeypatch):
    """Numbers of the shards that are written."""
    numbers = []
    write = code_shards.write_shard

    def written(folder, number, *rest, **options):
        numbers.append(number)
        return write(folder, number, *rest, **options)

    monkeypatch.setattr(code_shards, "write_shard", written)
    return numbers


def test_encoded_batches_are_the_codecs_and_keep_the_position(tokens, source):
    def images():
        return batches(source, batch_size=4, seed=0, px=tiny.PX, crop="prior")

    coded, plain = EncodedBatches(images(), tokens), images()
    for _ in range(2):
        codes = next(coded)["codes"]
        np.testing.assert_array_equal(codes, tokens.encode(next(plain)["image"]))
    chex.assert_shape(codes, (4, 4, 4))
    assert coded.get_state() == plain.get_state()
    expected = next(coded)
    again = EncodedBatches(images(), tokens)
    next(again)  # and one more is on its way
    again.set_state(plain.get_state())
    chex.assert_trees_all_equal(next(again), expected)


def test_the_next_batch_is_encoded_while_one_is_used(tokens):
    class Images:
        def __init__(self):
            self.asked = threading.Semaphore(0)

        def __next__(self):
            self.asked.release()
            return {"image": np.zeros((2, tiny.PX, tiny.PX, 3), np.uint8)}

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    below = Images()
    coded = EncodedBatches(below, tokens)
    next(coded)
    assert below.asked.acquire(timeout=60) and below.asked.acquire(timeout=60)


def test_parts_that_do_not_fill_the_devices_are_encoded_alike(tokens, source, monkeypatch):
    images = next(one_epoch(source, batch_size=7, px=tiny.PX))["image"]
    encoder = Encoder(tokens)
    encoder.batch_size, encoder._devices = 4, 4
    codes, errors = encoder(images)
    expected = tokens.codes_and_errors(images)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_allclose(errors, expected[1], rtol=1e-2)
    assert (codes.dtype, errors.dtype) == (np.int32, np.float16)


def test_batches_are_as_large_as_the_memory_that_is_free(tokens):
    class Device:
        platform = "gpu"

        def __init__(self, free):
            self.free = free

        def memory_stats(self):
            return {"bytes_limit": 10**9 + self.free, "bytes_in_use": 10**9}

    each = 16 * tiny.PX**2 * tokens.codec.width
    assert encode._images_a_device(tokens, Device(4 * 10 * each)) == 10
    assert encode._images_a_device(tokens, Device(each)) == 1


def test_codes_are_made_once_and_belong_to_their_codec(tokens, source, tmp_path, made):
    first = cached_codes(source, tokens, tmp_path)
    again = cached_codes(source, tokens, tmp_path)
    assert made == [0]
    image = next(one_epoch(source, batch_size=1, px=tiny.PX))["image"]
    np.testing.assert_array_equal(again[0]["codes"], tokens.encode(image)[0])
    assert first[3]["captions"] == source[3]["captions"]
    other = tiny.model(
        prior=None,
        prior_params=None,
        tokenizer=None,
        codec_params={
            **tiny.parts()["codec_params"],
            "encoder": tiny.parts()["codec_params"]["encoder"]
            | {"input": {"kernel": jnp.ones((7, 7, 3, 8)), "bias": jnp.zeros(8)}},
        },
    )
    with pytest.raises(SourceError, match="made by the codec"):
        cached_codes(source, other, tmp_path)


def test_what_has_changed_is_encoded_anew_and_nothing_else(
    tokens, images, tmp_path, monkeypatch, made
):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 2)
    codes = tmp_path / "codes"
    cached_codes(FolderSource(images), tokens, codes)
    assert made == [0, 1, 2]
    made.clear()

    write_image(images / "2.png", 9)  # under its old name
    now = cached_codes(FolderSource(images), tokens, codes)
    assert made == [1]
    pixels = [np.asarray(Image.open(images / f"{i}.png")) for i in range(5)]
    np.testing.assert_array_equal([now[i]["codes"] for i in range(5)], tokens.encode(pixels))
    made.clear()

    (images / "0.txt").write_text("image 4\n")
    (images / "4.txt").write_text("image 0\n")
    now = cached_codes(FolderSource(images), tokens, codes)
    assert made == [0, 2]
    assert [now[i]["captions"] for i in (0, 4)] == [["image 4"], ["image 0"]]
    made.clear()

    for path in images.glob("*.png"):  # copied without its time
        path.write_bytes(path.read_bytes())
    cached_codes(FolderSource(images), tokens, codes)
    assert made == []

    for path in images.glob("[34].*"):
        path.unlink()
    now = cached_codes(FolderSource(images), tokens, codes)
    assert len(now) == 3 and made == [1]
    assert len(list(codes.glob("*.array_record"))) == 2
    now.verify()


def test_encoding_that_was_cut_short_goes_on(tokens, images, tmp_path, monkeypatch, made):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 2)
    codes = tmp_path / "codes"
    cached_codes(FolderSource(images), tokens, codes)
    for i in range(5):
        write_image(images / f"{i}.png", 10 + i)
    full = encode.data_digest.content_digest

    def interrupted(source, records):
        if records.start == 2:
            raise KeyboardInterrupt
        return full(source, records)

    monkeypatch.setattr(encode.data_digest, "content_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_codes(FolderSource(images), tokens, codes)
    monkeypatch.setattr(encode.data_digest, "content_digest", full)
    made.clear()
    cached_codes(FolderSource(images), tokens, codes).verify()
    assert made == [1, 2]


def test_codes_of_another_version_are_made_anew(tokens, source, tmp_path, made):
    cached_codes(source, tokens, tmp_path)
    for note in tmp_path.glob("*.json"):
        if note.name != "manifest.json":
            note.unlink()
    cached_codes(source, tokens, tmp_path)
    assert made == [0, 0]


def test_images_are_reconstructed_once_and_anew_when_they_change(tokens, images, tmp_path):
    folder = tmp_path / "reconstructed"
    first = cached_reconstructions(FolderSource(images), tokens, folder)
    assert [first[i]["captions"] for i in range(5)] == [[f"image {i}"] for i in range(5)]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(stamps) == 5
    cached_reconstructions(FolderSource(images), tokens, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == stamps

    write_image(images / "2.png", 9)
    anew = cached_reconstructions(FolderSource(images), tokens, folder)
    image = np.asarray(Image.open(images / "2.png"))
    expected = tokens.decode(tokens.encode([image]))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(anew[2]["image"])), expected)
