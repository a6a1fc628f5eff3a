"""Files of PyTorch, read without it; the golden ones were made by golden/make_torch_files.py."""

import collections
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.pickles import Shell
from dalle_jax.weights.torch_file import module_tensors, read_torch
from dalle_jax.weights.torch_write import described_tensor, write_torch

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("kind", ["zip", "older"])
def test_both_containers_give_the_tensors_that_were_saved(kind):
    read = read_torch(GOLDEN / f"torch_{kind}.pt")
    state = read.pop("state_dict")
    assert read == {"epoch": 3, "names": ["a", ("b", None)], "rate": 0.5}
    expected = {
        "whole": BASE,
        "turned": BASE[1].T,
        "part": BASE[:, 1:, ::2],
        "half": BASE.astype(np.float16),
        "brain": BASE.astype(ml_dtypes.bfloat16),
        "count": np.int64(7),
        "yes": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "parameter": BASE[0, 0],
    }
    assert list(state) == list(expected)
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def as_zip(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
    return path


def as_older(path, content):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, 1001, system, content, [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    return path


@pytest.mark.parametrize("save", [as_zip, as_older])
def test_a_pickle_that_calls_something_else_is_refused_and_does_not_run(save, tmp_path):
    mark = tmp_path / "ran"
    path = save(tmp_path / "bad.pt", {"weight": Call(os.mkdir, str(mark))})
    with pytest.raises(WeightsError, match=r"bad.pt: it asks for \w+.mkdir, but only tensors are"):
        read_torch(path)
    assert not mark.exists()


@pytest.mark.parametrize("function", [eval, getattr, io.open, collections.Counter])
def test_no_name_is_known_but_those_of_tensors(function, tmp_path):
    with pytest.raises(WeightsError, match="asks for"):
        read_torch(as_zip(tmp_path / "bad.pt", {"weight": Call(function, "1")}))


def test_a_tensor_that_reaches_beyond_its_values_is_refused(tmp_path):
    path = tmp_path / "cut.pt"
    with zipfile.ZipFile(GOLDEN / "torch_zip.pt") as whole, zipfile.ZipFile(path, "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:8] if name.endswith("data/0") else content)
    with pytest.raises(WeightsError, match=r"a tensor of shape \[2, 3, 4\] does not fit its value"):
        read_torch(path)


def test_damaged_and_foreign_files_are_named(tmp_path):
    for content, said in ((b"hello", "does not start like a file of"), (b"", "is empty")):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(WeightsError, match=f"text.pt: it {said}"):
            read_torch(tmp_path / "text.pt")
    cut = shutil.copy(GOLDEN / "torch_older.pt", tmp_path / "cut.pt")
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(WeightsError, match=r"cut.pt"):
        read_torch(cut)
    with pytest.raises(WeightsError, match="it holds a list, not a dictionary"):
        read_torch(as_zip(tmp_path / "list.pt", [1]))
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pt")


def test_what_is_written_is_read_again_bit_for_bit(tmp_path):
    tree = {
        "state_dict": {"a": BASE, "b": BASE.astype(ml_dtypes.bfloat16)[0].T, "n": np.int64(7)},
        "epoch": 3,
        "name": "été",
        "yes": True,
        "none": np.zeros((0, 3), np.float16),
    }
    write_torch(tmp_path / "new.ckpt", tree)
    read = read_torch(tmp_path / "new.ckpt")
    assert (read["epoch"], read["name"], read["yes"]) == (3, "été", True)
    assert read["none"].shape == (0, 3)
    for name, array in tree["state_dict"].items():
        assert read["state_dict"][name].dtype == array.dtype
        np.testing.assert_array_equal(read["state_dict"][name], array)
    assert os.listdir(tmp_path) == ["new.ckpt"]


def test_a_torchscript_program_is_named(tmp_path):
    path = as_zip(tmp_path / "script.pt", {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(WeightsError, match=r"TorchScript program; save its state_dict\(\)"):
        read_torch(path)
    assert read_torch(path, shells=True) == {}


@pytest.mark.parametrize("save", [as_zip, as_older])
def test_with_shells_foreign_objects_are_read_but_never_called(save, tmp_path):
    mark = tmp_path / "ran"
    content = {"callbacks": {collections.Counter: Call(os.mkdir, str(mark))}, "epoch": 3}
    read = read_torch(save(tmp_path / "light.ckpt", content), shells=True)
    assert read["epoch"] == 3
    assert [shell.of for shell in read["callbacks"].values()] == ["posix.mkdir"]
    assert not mark.exists()


def test_of_a_module_parameters_and_buffers_are_read_by_their_names():
    class Part(Shell):
        pass

    def module(**state):
        part = Part()
        part.state = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": True} | state
        return part

    inner = module(_parameters={"w": BASE}, _buffers={"mean": BASE[0]})
    whole = module(_modules={"a": inner, "b": module(_modules={"c": inner})})
    inner.state["_modules"]["up"] = whole  # a cycle
    assert set(module_tensors(whole)) == {"a.w", "a.mean"}  # what is shared has its first name
    script = Part()
    script.state = {"weight": BASE, "size": 3, "part": inner}
    assert set(module_tensors(script)) == {"weight", "part.w", "part.mean"}


def raw_zip(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
    return path


@pytest.mark.parametrize(
    ("pickled", "said"),
    {
        "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "of 9 bytes numbers an object 2147483647"),
        "bytearray": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "BYTEARRAY8|not exist|damaged"),
        "text": (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
        "frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f}.", "FRAME"),
    }.values(),
)
def test_a_pickle_cannot_ask_for_memory(pickled, said, tmp_path):
    with pytest.raises(WeightsError, match=said):
        read_torch(raw_zip(tmp_path / "bad.pt", pickled), shells=True)


def test_lists_that_double_sixty_times_are_read_at_once(tmp_path):
    content = []
    for _ in range(60):
        content = [content, content]
    assert "lists" in read_torch(as_zip(tmp_path / "laugh.pt", {"lists": content}))


def one_view(path, shape, strides, offset, compression=zipfile.ZIP_STORED):
    """A file of one tensor, which looks at the four values of one storage."""
    view = described_tensor("0", "FloatStorage", 4, offset, shape, strides)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}(X\6\0\0\0weight" + view + b"u.")
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes(), compression)
    return path


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2**40, 2**20), (0, 0), 0),
        ((5,), (1,), 0),
        ((2, 2), (-1, 1), 0),
        ((4,), (1,), -1),
        ((2,), (1,), 3),
        ((-1, -4), (1, 1), 0),
        ((2,), (1, 1), 0),
    ],
)
def test_a_view_never_leaves_its_values_nor_is_larger(shape, strides, offset, tmp_path):
    fits = one_view(tmp_path / "fits.pt", (2, 2), (2, 1), 0)
    assert read_torch(fits)["weight"].tolist() == [[0, 1], [2, 3]]
    path = one_view(tmp_path / "view.pt", shape, strides, offset)
    with pytest.raises(WeightsError, match="a tensor|damaged"):
        read_torch(path)


def test_compressed_values_are_refused_and_so_are_members_outside_the_file(tmp_path):
    path = one_view(tmp_path / "bomb.pt", (4,), (1,), 0, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"x/data/0 is compressed in it"):
        read_torch(path)
    content = bytearray((GOLDEN / "torch_zip.pt").read_bytes())
    with zipfile.ZipFile(GOLDEN / "torch_zip.pt") as archive:
        at = archive.getinfo("torch_zip/data/0").header_offset
    content[at : at + 2] = b"??"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is not where its list of files says"):
        read_torch(path)
