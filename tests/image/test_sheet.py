import numpy as np
import pytest
from PIL import Image, ImageFont

from dalle_jax.errors import UserError
from dalle_jax.image import fonts
from dalle_jax.image.fonts import FONT_PX, Typesetter, typesetter
from dalle_jax.image.pixels import decode
from dalle_jax.image.sheet import (
    COLUMNS,
    GAP_PX,
    PAPER,
    check_gif,
    contact_sheet,
    save_gif,
    save_png,
)


def noise(rows, n, px):
    return np.random.default_rng(0).integers(0, 256, (rows, n, px, px, 3), dtype=np.uint8)


def test_small_images_are_magnified_by_a_whole_number():
    images = noise(1, 2, 32)
    sheet = contact_sheet(images)
    cell = sheet[GAP_PX : GAP_PX + 128, GAP_PX : GAP_PX + 128]
    np.testing.assert_array_equal(cell[::4, ::4], images[0, 0])
    np.testing.assert_array_equal(cell[3::4, 3::4], images[0, 0])


def test_every_row_has_ink_above_it_and_the_image_below():
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
    images = noise(1, 1, 128)
    sheet = contact_sheet(images, ["a red apple to the left of a very long crying cat in the rain"])
    short = contact_sheet(images, ["apple"])
    assert sheet.shape[1] == short.shape[1]
    assert sheet.shape[0] > short.shape[0]
    assert (sheet[:, -GAP_PX:] == PAPER).all()


def test_a_word_longer_than_the_sheet_is_broken():
    sheet = contact_sheet(noise(1, 1, 128), ["w" * 400])
    assert (sheet[:, -GAP_PX:] == PAPER).all()
    assert len(typesetter().wrap("w" * 400, 128)) > 20


def test_more_images_than_fit_side_by_side_go_on_below():
    images = noise(2, COLUMNS + 1, 128)
    sheet = contact_sheet(images, ["red apple", "crying cat"])
    assert sheet.shape[1] == contact_sheet(images[:, :COLUMNS]).shape[1]
    np.testing.assert_array_equal(
        sheet[-GAP_PX - 128 : -GAP_PX, GAP_PX : GAP_PX + 128], images[1, COLUMNS]
    )
    right = sheet[-2 * GAP_PX - 256 : -2 * GAP_PX - 128, -GAP_PX - 128 : -GAP_PX]
    np.testing.assert_array_equal(right, images[1, COLUMNS - 1])
    assert (sheet[-GAP_PX - 128 :, 2 * GAP_PX + 128 :] == PAPER).all()


def test_a_sheet_too_large_for_a_gif_is_refused_by_its_size():
    check_gif(490, 64, ["red apple"])
    with pytest.raises(UserError, match=r"has 2150 x 67\d+ pixels, but a GIF at most 65535 a side"):
        check_gif(8000, 64, ["red apple"])


# Scripts that Pillow's own font does not have


@pytest.fixture
def plain():
    """A typesetter on a system without fonts."""
    return Typesetter([])


@pytest.fixture
def with_font(tmp_path, monkeypatch):
    """A typesetter that has a font for Chinese: Pillow's own, which claims to."""
    font = ImageFont.load_default(FONT_PX)
    (tmp_path / "fonts" / "deep").mkdir(parents=True)
    for name in ("cjk.ttf", "damaged.otf", "cjk-Bold.ttf", "notes.txt"):
        (tmp_path / "fonts" / "deep" / name).touch()
    setter, opened = Typesetter([tmp_path / "fonts"]), []

    def truetype(path, size):
        opened.append(path.name)
        if path.name == "damaged.otf":
            raise OSError("unknown file format")
        return font

    def draws(of, char, nothing):
        return char.isascii() or (of is font and char in "红苹果")

    monkeypatch.setattr(fonts.ImageFont, "truetype", truetype)
    monkeypatch.setattr(fonts, "_draws", draws)
    return setter, font, opened


def test_characters_that_no_font_has_become_escapes_and_the_log_says_so_once(plain, caplog):
    assert plain.legible("红 red\tapple") == "\\u7ea2 red apple"
    assert plain.legible("苹果") == "\\u82f9\\u679c"
    assert plain.legible("\ud800") == "\\ud800"
    assert caplog.text.count("no font of this system can show '红'") == 1
    assert "果" not in caplog.text


def test_a_font_of_the_system_is_taken_for_what_it_has(with_font):
    setter, font, opened = with_font
    assert setter.legible("a 红苹果 猫") == "a 红苹果 \\u732b"
    assert opened == ["cjk.ttf", "damaged.otf", "cjk-Bold.ttf"]  # plain ones first
    runs = list(setter._runs("a 红苹果 b"))
    assert [part for _, part in runs] == ["a ", "红苹果 ", "b"]
    assert runs[1][0] is font
    setter.legible("果红猫")
    assert len(opened) == 3  # what was looked for is known


def test_letters_written_leftwards_need_a_library_that_can(monkeypatch):
    font = ImageFont.load_default(FONT_PX)
    monkeypatch.setattr(fonts.features, "check", lambda name: name != "fribidi")
    assert not fonts._draws(font, "\u0639", b"")
    assert fonts._draws(font, "a", b"")


def test_accents_and_joiners_are_drawn_with_their_letter(plain):
    assert plain.legible("a\u200bpp\ufe0fle") == "apple"
    assert plain.legible("e\u0301") == plain.legible("\u00e9")


def test_a_label_missing_is_an_error():
    with pytest.raises(ValueError, match="2 rows of images need 2 labels, got 1"):
        contact_sheet(noise(2, 1, 8), ["only one"])


def test_a_sheet_without_images_is_an_error():
    with pytest.raises(ValueError, match="at least one image, got 1 rows of 0"):
        contact_sheet(noise(1, 0, 8))


def test_saving_makes_the_folder_and_leaves_one_whole_file(tmp_path):
    image = noise(1, 1, 8)[0, 0]
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
