"""Files of flax are read as data: what it wrote is the same, what is damaged is refused."""

import random
import resource
import struct
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest

from dalle_jax.weights import msgpack_file
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.msgpack_file import read_msgpack

TREE = {
    "model": {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones((2, 1), np.float16),
        "b": {"bfloat": np.asarray([1.5, -2], ml_dtypes.bfloat16), "none": np.zeros((0, 4))},
    },
    "long" * 20: np.arange(300, dtype=np.int32),
    "scalar": np.float32(2.5),
}


def written(folder: Path, tree=TREE) -> Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def of_bytes(folder: Path, data: bytes) -> Path:
    (folder / "x.msgpack").write_bytes(data)
    return folder / "x.msgpack"


def array(shape: bytes, dtype: bytes, values: bytes) -> bytes:
    """A dictionary that holds an array with these parts, as msgpack has them."""
    body = b"\x93" + shape + bytes([0xA0 + len(dtype)]) + dtype + b"\xc4" + bytes([len(values)])
    body += values
    return b"\x81\xa1w\xc7" + bytes([len(body)]) + b"\x01" + body


def test_what_flax_wrote_is_read_by_whole_names_without_a_copy(tmp_path):
    found = read_msgpack(written(tmp_path))
    model = TREE["model"]
    wanted = {"model/a": model["a"], "model/half": model["half"], "scalar": TREE["scalar"]}
    wanted |= {f"model/b/{name}": value for name, value in model["b"].items()}
    wanted["long" * 20] = TREE["long" * 20]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
        assert not found[name].flags.owndata and not found[name].flags.writeable


def test_arrays_written_in_pieces_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    path = written(tmp_path, {"x": {"w": np.arange(35, dtype=np.float32).reshape(5, 7)}})
    assert b"chunked" in path.read_bytes()
    np.testing.assert_array_equal(read_msgpack(path)["x/w"], np.arange(35).reshape(5, 7))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"\x80\x80", "1 bytes follow its end"),
        (b"\x90", "it holds a list, not a dictionary"),
        (b"\x81\xa1w\x01", "its 'w' is no array"),
        (b"\x81\x01\x01", "its name '1' is no text"),
        (b"\x82\xa1w\x80\xa1w\x80", "its name 'w' is no text or stands there twice"),
        (b"\x81\xa1w\xd4\x02\x00", "extension 2, which flax does not write"),
        (b"\x81\xa1w\xc1", "type 0xc1, which parameters do not need"),
        (b"\x81\xa1w\xdd\xff\xff\xff\xff", "it ends before its values do; it is cut"),
        (b"\x81\xa1w\xc6\xff\xff\xff\xff", "it ends before its values do; it is cut"),
        (b"\x81\xa1w" * 99, "nested more than 64 times"),
        (array(b"\x91\x02", b"float32", bytes(4)), "is damaged or not a msgpack file of flax"),
        (array(b"\x91\xa1x", b"float32", bytes(4)), "a size that is no whole number"),
        (array(b"\x91\x01", b"object", bytes(8)), "it has an array of 'object', wanted one of"),
        (array(b"\x91\x01", b"float32", bytes(4))[:-1], "it ends before its values do"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(data, said, tmp_path):
    with pytest.raises(WeightsError, match=said) as caught:
        read_msgpack(of_bytes(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_many_small_values_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack_file, "_MOST_PARTS", 1000)
    data = b"\x81\xa1w\xdd" + struct.pack(">I", 2000) + bytes(2000)
    with pytest.raises(WeightsError, match="more than 1000 values; it is no honest one"):
        read_msgpack(of_bytes(tmp_path, data))


def test_pieces_that_do_not_make_the_array_up_are_refused(tmp_path):
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {"0": np.ones(2)}}
    with pytest.raises(WeightsError, match="an array's pieces do not make it up"):
        read_msgpack(written(tmp_path, {"w": pieces}))


def test_random_damage_ends_in_a_reading_or_a_sentence(tmp_path):
    rng, good = random.Random(0), written(tmp_path).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.2:
                del data[at:]
                data += b"\xc0"
            elif rng.random() < 0.3:
                data[at : at + 5] = rng.choice(b"\xc6\xc9\xdb\xdd\xdf").to_bytes() + b"\xff" * 4
            else:
                data[at] = rng.randrange(256)
        path = tmp_path / "x.msgpack"
        path.unlink(missing_ok=True)
        try:
            for value in read_msgpack(of_bytes(tmp_path, data)).values():
                value.tobytes()
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
            assert "MemoryError" not in str(error)
            refused += 1
    assert 100 < refused < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
