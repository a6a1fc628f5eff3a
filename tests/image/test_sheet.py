import numpy as np
import pytest
from PIL import Image

from dalle_jax.image.pixels import decode
from dalle_jax.image.sheet import GAP_PX, PAPER, contact_sheet, save_gif, save_png


def pictures(rows, n, px):
    return np.random.default_rng(0).integers(0, 256, (rows, n, px, px, 3), dtype=np.uint8)


def test_small_pictures_are_magnified_by_a_whole_number():
    images = pictures(1, 2, 32)
    sheet = contact_sheet(images)
    cell = sheet[GAP_PX : GAP_PX + 128, GAP_PX : GAP_PX + 128]
    np.testing.assert_array_equal(cell[::4, ::4], images[0, 0])
    np.testing.assert_array_equal(cell[3::4, 3::4], images[0, 0])


def test_every_row_has_ink_above_it_and_the_picture_below():
    images = np.zeros((2, 3, 128, 128, 3), np.uint8)
    images[1] = 255
    sheet = contact_sheet(images, ["a red apple", "crying cat"])
    extra = sheet.shape[0] - contact_sheet(images).shape[0]
    strip = extra // 2  # one line of text above each row
    first, second = sheet[GAP_PX : GAP_PX + strip], sheet[-GAP_PX - 128 - strip : -GAP_PX - 128]
    assert first.min() < 100
    assert second.min() < 100
    assert (sheet[GAP_PX + strip : GAP_PX + strip + 128, GAP_PX : GAP_PX + 128] == 0).all()
    assert (sheet[-GAP_PX - 128 : -GAP_PX, GAP_PX : GAP_PX + 128] == 255).all()


def test_a_long_label_is_wrapped_and_stays_inside_the_sheet():
    images = pictures(1, 1, 128)
    sheet = contact_sheet(images, ["a red apple to the left of a very long crying cat in the rain"])
    short = contact_sheet(images, ["apple"])
    assert sheet.shape[1] == short.shape[1]
    assert sheet.shape[0] > short.shape[0]
    assert (sheet[:, -GAP_PX:] == PAPER).all()


def test_a_label_missing_is_an_error():
    with pytest.raises(ValueError, match="2 rows of pictures need 2 labels, got 1"):
        contact_sheet(pictures(2, 1, 8), ["only one"])


def test_a_sheet_without_pictures_is_an_error():
    with pytest.raises(ValueError, match="at least one picture, got 1 rows of 0"):
        contact_sheet(pictures(1, 0, 8))


def test_saving_makes_the_folder_and_leaves_one_whole_file(tmp_path):
    image = pictures(1, 1, 8)[0, 0]
    target = tmp_path / "sheets" / "000500.png"
    save_png(target, image)
    np.testing.assert_array_equal(decode(target), image)
    assert [p.name for p in target.parent.iterdir()] == ["000500.png"]


def test_an_animation_has_all_frames_and_rests_on_the_last(tmp_path):
    frames = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 255)])
    save_gif(tmp_path / "deep" / "steps.gif", frames, seconds=1.0)
    with Image.open(tmp_path / "deep" / "steps.gif") as gif:
        assert gif.n_frames == 3
        shades, lengths = [], []
        for i in range(3):
            gif.seek(i)
            shades.append(int(np.asarray(gif.convert("RGB"))[0, 0, 0]))
            lengths.append(gif.info["duration"])
    assert shades == [0, 100, 255]
    assert lengths == [500, 500, 1000]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["steps.gif"]
