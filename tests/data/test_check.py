import os

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.check import check
from dalle_jax.data.sources import SourceError
from dalle_jax.image.pixels import encode_png


def image(high, wide, shade=0):
    pixels = np.full((high, wide, 3), shade, np.uint8)
    pixels[-1, -1] = 255
    return encode_png(pixels)


@pytest.fixture
def folder(tmp_path):
    files = {
        "good.png": image(70, 80, 1),
        "copy.png": image(70, 80, 1),
        "small.png": image(70, 30, 2),
        "long.png": image(64, 129, 3),
        "twice.png": image(64, 128, 4),
        "half.png": image(64, 64, 5)[:60],
        "mute.png": image(64, 64, 6),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        if name != "mute.png":
            (tmp_path / name).with_suffix(".txt").write_text("one\ntwo\n")
    (tmp_path / "ghost.txt").write_text("boo")
    return tmp_path


def test_each_kind_of_trouble_is_found_by_name(folder):
    report = check(folder)
    assert (report.images, report.captions, report.pairs) == (7, 12, 5)
    assert list(report.unreadable) == ["half.png"]
    assert report.tiny == {"small.png": "30x70"}
    assert report.elongated == {"long.png": "129x64", "small.png": "30x70"}
    assert report.captionless == ["mute.png"]
    assert report.missing == {"ghost.txt": "no image of that name is there"}
    assert report.duplicates == [["copy.png", "good.png"]]


def test_the_printed_report_counts_and_names(folder):
    text = str(check(folder))
    assert "7 images, 12 captions, 5 images to train on" in text
    assert "1 cannot be read:\n  half.png: damaged or truncated" in text
    assert "1 are tiny (short side below 64 px):\n  small.png: 30x70" in text
    assert "copy.png = good.png" in text
    assert "nothing to complain" not in text


def test_images_of_one_colour_are_named_such_as_white_drawings_on_transparency(tmp_path):
    drawing = np.full((64, 64, 4), 255, np.uint8)
    drawing[:, :32, 3] = 0  # left half transparent, right half white
    Image.fromarray(drawing).save(tmp_path / "white.png")
    drawing[63, 63, 2] = 254
    Image.fromarray(drawing).save(tmp_path / "nearly.png")
    Image.new("RGB", (64, 64), (200, 30, 31)).save(tmp_path / "red.png")
    report = check(tmp_path)
    assert report.blank == {"red.png": "#c81e1f", "white.png": "#ffffff"}
    assert "2 are of one colour throughout, seen on white:\n  red.png: #c81e1f" in str(report)


def test_large_photographs_are_named_since_reading_them_takes_long(tmp_path):
    for name, high in {"large.png": 2001, "fits.png": 2000}.items():
        (tmp_path / name).write_bytes(image(high, 2000))
        (tmp_path / name).with_suffix(".txt").write_text("a")
    report = check(tmp_path)
    assert report.large == {"large.png": "2000x2001"}
    assert "1 are larger than 4 megapixels, so that reading may hold training back" in str(report)


def test_names_that_are_not_utf_8_are_looked_at_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(image(64, 64)[:60])
    report = check(tmp_path)
    assert str(report).encode()
    assert r"  caf\udce9.png: damaged or truncated" in str(report)


def test_what_training_refuses_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(image(64, 64))
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a green circle, on white\n")
    with pytest.raises(SourceError, match="captions.csv, line 2: 3 cells"):
        check(tmp_path)


def test_what_counts_as_tiny_can_be_set(folder):
    assert sorted(check(folder, px=70).tiny) == ["long.png", "mute.png", "small.png", "twice.png"]


def test_images_of_other_shape_but_equal_bytes_are_no_duplicates(tmp_path):
    for name, shape in {"a.png": (4, 8), "b.png": (8, 4)}.items():
        (tmp_path / name).write_bytes(image(*shape))
    assert check(tmp_path).duplicates == []


def test_a_clean_folder_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(image(64, 64))
    (tmp_path / "a.txt").write_text("a")
    assert str(check(tmp_path)).endswith("1 images to train on\nnothing to complain about")


def test_a_long_list_is_cut_but_counted(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.png").write_bytes(image(64, 64, i))
    text = str(check(tmp_path))
    assert "25 have no caption" in text
    assert "... and 5 more" in text


def test_progress_reaches_the_end(folder):
    seen = []
    check(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="holds no images"):
        check(tmp_path)
