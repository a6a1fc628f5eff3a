"""Codes and reconstructed pictures: made once, and anew when what they were made of has changed."""

import io
import threading

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from dalle_jax.data import code_shards
from dalle_jax.data.batches import batches, once
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.data.sources import FolderSource, SourceError
from dalle_jax.train import encode
from dalle_jax.train.encode import EncodedBatches, Encoder, encoded, reconstructed


@pytest.fixture(scope="module")
def tokens():
    return tiny.model(prior=None, prior_params=None, tokenizer=None)


@pytest.fixture(scope="module")
def source():
    return ShapesSource("validation", px=tiny.PX)


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        write_picture(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text(f"picture {i}\n")
    return folder


def write_picture(path, seed):
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
    def pictures():
        return batches(source, batch_size=4, seed=0, px=tiny.PX, crop="prior")

    coded, plain = EncodedBatches(pictures(), tokens), pictures()
    for _ in range(2):
        codes = next(coded)["codes"]
        np.testing.assert_array_equal(codes, tokens.encode(next(plain)["image"]))
    chex.assert_shape(codes, (4, 4, 4))
    assert coded.get_state() == plain.get_state()
    expected = next(coded)
    again = EncodedBatches(pictures(), tokens)
    next(again)  # and one more is on its way
    again.set_state(plain.get_state())
    chex.assert_trees_all_equal(next(again), expected)


def test_the_next_batch_is_encoded_while_one_is_used(tokens):
    class Pictures:
        def __init__(self):
            self.asked = threading.Semaphore(0)

        def __next__(self):
            self.asked.release()
            return {"image": np.zeros((2, tiny.PX, tiny.PX, 3), np.uint8)}

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    below = Pictures()
    coded = EncodedBatches(below, tokens)
    next(coded)
    assert below.asked.acquire(timeout=60) and below.asked.acquire(timeout=60)


def test_parts_that_do_not_fill_the_devices_are_encoded_alike(tokens, source, monkeypatch):
    images = next(once(source, batch_size=7, px=tiny.PX))["image"]
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
    assert encode._pictures_a_device(tokens, Device(4 * 10 * each)) == 10
    assert encode._pictures_a_device(tokens, Device(each)) == 1


def test_codes_are_made_once_and_belong_to_their_codec(tokens, source, tmp_path, made):
    first = encoded(source, tokens, tmp_path)
    again = encoded(source, tokens, tmp_path)
    assert made == [0]
    picture = next(once(source, batch_size=1, px=tiny.PX))["image"]
    np.testing.assert_array_equal(again[0]["codes"], tokens.encode(picture)[0])
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
        encoded(source, other, tmp_path)


def test_what_has_changed_is_encoded_anew_and_nothing_else(
    tokens, pictures, tmp_path, monkeypatch, made
):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 2)
    codes = tmp_path / "codes"
    encoded(FolderSource(pictures), tokens, codes)
    assert made == [0, 1, 2]
    made.clear()

    write_picture(pictures / "2.png", 9)  # under its old name
    now = encoded(FolderSource(pictures), tokens, codes)
    assert made == [1]
    images = [np.asarray(Image.open(pictures / f"{i}.png")) for i in range(5)]
    np.testing.assert_array_equal([now[i]["codes"] for i in range(5)], tokens.encode(images))
    made.clear()

    (pictures / "0.txt").write_text("picture 4\n")
    (pictures / "4.txt").write_text("picture 0\n")
    now = encoded(FolderSource(pictures), tokens, codes)
    assert made == [0, 2]
    assert [now[i]["captions"] for i in (0, 4)] == [["picture 4"], ["picture 0"]]
    made.clear()

    for path in pictures.glob("*.png"):  # copied without its time
        path.write_bytes(path.read_bytes())
    encoded(FolderSource(pictures), tokens, codes)
    assert made == []

    for path in pictures.glob("[34].*"):
        path.unlink()
    now = encoded(FolderSource(pictures), tokens, codes)
    assert len(now) == 3 and made == [1]
    assert len(list(codes.glob("*.array_record"))) == 2
    now.verify()


def test_encoding_that_was_cut_short_goes_on(tokens, pictures, tmp_path, monkeypatch, made):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 2)
    codes = tmp_path / "codes"
    encoded(FolderSource(pictures), tokens, codes)
    for i in range(5):
        write_picture(pictures / f"{i}.png", 10 + i)
    full = encode.content.full

    def interrupted(source, records):
        if records.start == 2:
            raise KeyboardInterrupt
        return full(source, records)

    monkeypatch.setattr(encode.content, "full", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded(FolderSource(pictures), tokens, codes)
    monkeypatch.setattr(encode.content, "full", full)
    made.clear()
    encoded(FolderSource(pictures), tokens, codes).verify()
    assert made == [1, 2]


def test_codes_of_another_version_are_made_anew(tokens, source, tmp_path, made):
    encoded(source, tokens, tmp_path)
    for note in tmp_path.glob("*.json"):
        if note.name != "manifest.json":
            note.unlink()
    encoded(source, tokens, tmp_path)
    assert made == [0, 0]


def test_pictures_are_reconstructed_once_and_anew_when_they_change(tokens, pictures, tmp_path):
    folder = tmp_path / "reconstructed"
    first = reconstructed(FolderSource(pictures), tokens, folder)
    assert [first[i]["captions"] for i in range(5)] == [[f"picture {i}"] for i in range(5)]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(stamps) == 5
    reconstructed(FolderSource(pictures), tokens, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == stamps

    write_picture(pictures / "2.png", 9)
    anew = reconstructed(FolderSource(pictures), tokens, folder)
    image = np.asarray(Image.open(pictures / "2.png"))
    expected = tokens.decode(tokens.encode([image]))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(anew[2]["image"])), expected)
