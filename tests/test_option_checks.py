import tempfile
from pathlib import Path

import pytest

from dalle_jax.errors import UserError
from dalle_jax.option_checks import check_input, check_output, check_output_folder, save_outputs


def test_none_and_what_can_be_used_pass_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").touch()
    for path in (None, Path("old.png"), Path("new/deep/sheet.PNG"), tmp_path / "new.png"):
        check_output("--out", path, ".png")
    for path in (None, Path("."), Path("new/deep"), tmp_path):
        check_output_folder("--out", path)
    check_input("--mask", Path("old.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_a_name_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"--out is a.jpg; it is a PNG, so its name must end"):
        check_output("--out", Path("a.jpg"), ".png")


def test_all_outputs_are_saved_though_one_place_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def save(path):
        if path.parent.name == "full":
            raise OSError(28, "No space left on device")
        path.write_text(path.name)

    outputs = [(tmp_path / "full" / "a", save), (tmp_path / "b", save)]
    with pytest.raises(UserError, match=r"could not be written \(No space left") as error:
        save_outputs(outputs)
    assert (tmp_path / "b").read_text() == "b"
    assert Path(str(error.value).split()[-2]).read_text() == "a"
