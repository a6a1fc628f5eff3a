import os
import unicodedata

import pytest

from dalle_jax.data.folder_listing import list_folder, scan
from dalle_jax.data.record import SourceError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def captions(folder):
    return {name: texts for name, texts in list_folder(folder).captions.items() if texts}


@pytest.mark.parametrize("suffix", [".gif", ".bmp", ".tif", ".TIFF", ".avif", ".webp", ".JPeG"])
def test_images_of_all_formats_are_taken(tmp_path, suffix):
    write(tmp_path, {f"x{suffix}": "", "x.txt": "red"})
    assert captions(tmp_path) == {f"x{suffix}": ["red"]}


@pytest.mark.parametrize("name", ["x.txt", "x.TXT", "x.png.txt", "X.Txt", "X.PNG.txt"])
def test_text_files_may_have_either_name(tmp_path, name):
    write(tmp_path, {"x.png": "", name: "one\r\n\u200b\ntwo\u2028three\n"})
    assert captions(tmp_path) == {"x.png": ["one", "two\u2028three"]}


def test_a_text_file_without_an_image_has_the_true_reason(tmp_path):
    write(tmp_path, {"a.png": "", "x.heic": "", "x.txt": "red", "y.txt": "blue"})
    assert list_folder(tmp_path).missing == {
        "x.txt": "x.heic is not a kind of image that is read (.jpg, .jpeg, .png, .webp, .gif, "
        ".bmp, .tif, .tiff, .avif)",
        "y.txt": "no image of that name is there",
    }


def table(folder, *names):
    lines = "".join(f"{name},about {number}\n" for number, name in enumerate(names))
    (folder / "captions.csv").write_text(f"image,caption\n{lines}", encoding="utf-8")


@pytest.mark.parametrize(
    "written", ["deep/x.png", "./deep/x.png", "deep\\x.png", "Deep/X.PNG", "deep/../deep/x.png"]
)
def test_a_table_may_write_a_name_in_many_ways(tmp_path, written):
    write(tmp_path, {"deep/x.png": ""})
    table(tmp_path, written)
    assert captions(tmp_path) == {"deep/x.png": ["about 0"]}


def test_absolute_paths_into_the_folder_are_taken(tmp_path, monkeypatch):
    write(tmp_path, {"real/x.png": ""})
    (tmp_path / "link").symlink_to("real")
    table(tmp_path / "real", tmp_path / "real/x.png", tmp_path / "link/x.png")
    monkeypatch.chdir(tmp_path)
    assert captions("link") == {"x.png": ["about 0", "about 1"]}


def test_a_name_without_an_image_has_the_true_reason(tmp_path):
    write(tmp_path, {"a.png": "", "x.heic": "", ".hidden/x.png": ""})
    names = ["gone.png", "../a.png", "/elsewhere/a.png", "C:\\a.png", "x.heic", ".hidden/x.png"]
    table(tmp_path, *names)
    reasons = list_folder(tmp_path).missing
    assert list(reasons) == sorted(names)
    assert reasons["gone.png"] == "not there"
    assert reasons["../a.png"] == "leads out of the folder"
    assert reasons["/elsewhere/a.png"] == reasons["C:\\a.png"]
    assert reasons["C:\\a.png"].startswith("a path outside of the folder")
    assert reasons["x.heic"].startswith("not a kind of image that is read (.jpg")
    assert reasons[".hidden/x.png"] == "hidden files are passed over"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("beside", [True, False])
def test_names_match_in_another_unicode_form(tmp_path, forms, beside):
    on_disk, written = (unicodedata.normalize(form, "café") for form in forms)
    write(tmp_path, {f"{on_disk}.png": ""})
    if beside:
        write(tmp_path, {f"{written}.txt": "about 0"})
    else:
        table(tmp_path, f"{written}.png")
    assert captions(tmp_path) == {f"{on_disk}.png": ["about 0"]}


def test_an_exact_name_comes_before_one_in_another_case(tmp_path):
    write(tmp_path, {"a.png": "", "A.png": ""})
    table(tmp_path, "A.png", "a.png")
    assert captions(tmp_path) == {"A.png": ["about 0"], "a.png": ["about 1"]}
    table(tmp_path, "A.PNG")
    with pytest.raises(SourceError, match=r"line 2: A.PNG may be A.png or a.png; write it exactly"):
        list_folder(tmp_path)


def test_links_to_folders_are_followed_once_and_without_loops(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside, {"deep/a.png": "", "deep/a.txt": "a"})
    write(outside, {"b.png": "", "b.txt": "b"})
    (inside / "deep/linked").symlink_to(outside)
    (inside / "again").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "up").symlink_to(tmp_path)
    (inside / "sideways").symlink_to(inside / "deep")
    (outside / "back").symlink_to(inside)
    (inside / "gone.png").symlink_to("nowhere.png")
    found = list(scan(inside))
    assert found == ["again/b.png", "again/b.txt", "deep/a.png", "deep/a.txt", "gone.png"]


def test_names_that_are_not_utf_8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {f"{name}.png": "", f"{name}.txt": "coffee"})
    assert captions(tmp_path) == {f"{name}.png": ["coffee"]}
