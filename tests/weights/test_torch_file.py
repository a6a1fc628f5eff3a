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

from dalle_jax.weights.torch_file import WeightsError, read_torch

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
    for name, content in {"text.pt": b"hello", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name} is damaged or not a file of torch.save"):
            read_torch(tmp_path / name)
    cut = shutil.copy(GOLDEN / "torch_older.pt", tmp_path / "cut.pt")
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(WeightsError, match=r"cut.pt"):
        read_torch(cut)
    with pytest.raises(WeightsError, match="it holds a list, not a dictionary"):
        read_torch(as_zip(tmp_path / "list.pt", [1]))
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pt")


def test_a_torchscript_program_is_named(tmp_path):
    path = as_zip(tmp_path / "script.pt", {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(WeightsError, match=r"TorchScript program; save its state_dict\(\)"):
        read_torch(path)
