import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax.image.pixels import (
    BYTES_PER_PIXEL,
    MAX_PIXELS,
    ImageError,
    area_resize,
    crop_center,
    crop_dvae,
    crop_prior,
    decode,
    encode_png,
    map_pixels,
    read_size,
    unmap_pixels,
)


def noise(high, wide, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)


def packed(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Scripted(np.random.Generator):
    """Draws the highest or lowest value allowed, and notes every range it was asked for."""

    def __new__(cls, highest):
        return np.random.Generator.__new__(cls)

    def __init__(self, highest):
        super().__init__(np.random.PCG64(0))
        self.highest, self.ranges = highest, []

    def integers(self, low, high=None, size=None, endpoint=False):
        low, high = (0, low) if high is None else (low, high)
        top = high if endpoint else high - 1
        self.ranges.append((int(low), int(top)))
        drawn = top if self.highest else low
        return np.full(size, drawn) if size else drawn

    def random(self):
        return 0.9 if self.highest else 0.1


def test_area_resize_of_five_to_three_follows_the_written_example():
    # scale (5-1)/(3-1) = 2: outputs average [0,2), [2,4), [4,6), the last seeing only pixel 4.
    row = np.array([10, 20, 30, 50, 90], np.uint8)
    image = np.broadcast_to(row[None, :, None], (5, 5, 3)).copy()
    np.testing.assert_array_equal(area_resize(image, (5, 3))[0, :, 0], [15, 40, 90])
    np.testing.assert_array_equal(area_resize(image.swapaxes(0, 1), (3, 5))[:, 0, 0], [15, 40, 90])


def test_area_resize_with_a_fractional_scale_follows_the_written_example():
    # scale 3/2: [0,1.5) = (a + b/2)/1.5, [1.5,3) = (b/2 + c)/1.5, [3,4.5) = d.
    image = np.broadcast_to(np.array([0, 60, 90, 200], np.uint8)[None, :, None], (4, 4, 3)).copy()
    np.testing.assert_array_equal(area_resize(image, (4, 3))[0, :, 0], [20, 80, 200])


def test_area_resize_to_the_same_size_changes_nothing():
    image = noise(7, 9)
    np.testing.assert_array_equal(area_resize(image, (7, 9)), image)


def test_area_resize_keeps_a_flat_image_flat():
    flat = np.full((37, 23, 3), 201, np.uint8)
    assert (area_resize(flat, (11, 17)) == 201).all()
    assert (area_resize(flat[:1, :1], (4, 4)) == 201).all()
    assert (area_resize(flat, (1, 1)) == 201).all()


def dense_area(n_in, n_out):
    """The same weights as one matrix [out, in], in double precision."""
    scale = (n_in - 1) / (n_out - 1) if n_out > 1 else float(n_in)
    start, left = np.arange(n_out)[:, None] * scale, np.arange(n_in)
    right = np.append(left[1:], np.inf)
    return np.maximum(np.minimum(start + scale, right) - np.maximum(start, left), 0) / scale


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((37, 50), (11, 17)),
        ((90, 61), (61, 60)),
        ((8, 9), (20, 31)),
        ((7, 5), (1, 5)),
        ((2, 64), (2, 3)),
    ],
)
def test_area_resize_equals_a_product_with_dense_matrices(shape, size):
    image = noise(*shape)
    rows, columns = dense_area(shape[0], size[0]), dense_area(shape[1], size[1])
    exact = np.einsum("ij,jkc,lk->ilc", rows, image, columns)
    resized = area_resize(image, size)
    clear = np.abs(exact % 1 - 0.5) > 1e-4  # which way a half is rounded, float32 may decide
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(resized[clear], np.rint(exact)[clear])
    assert np.abs(resized - exact).max() < 0.501


def test_area_resize_takes_little_more_memory_than_the_image():
    image = noise(1500, 1500)[:, :1400]
    tracemalloc.start()
    try:
        area_resize(image, (280, 288))
        _, peak = tracemalloc.get_traced_memory()
        area_resize(image[:1300], (280, 288))
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * image.nbytes  # dense float32 takes 4 for the image alone
    assert left < 100_000  # no matrix stays behind, of 1.7 MB each


def test_dvae_crop_draws_from_the_ranges_of_listing_1():
    rng = Scripted(highest=True)
    assert crop_dvae(noise(500, 420), 256, rng).shape == (256, 256, 3)
    # position of the 420 square, side 288 to 384, position of the window in 384
    assert rng.ranges == [(0, 80), (0, 0), (288, 384), (0, 128)]
    rng = Scripted(highest=True)
    crop_dvae(noise(300, 300), 256, rng)
    assert rng.ranges[2] == (288, 300)
    rng = Scripted(highest=True)
    crop_dvae(noise(270, 270), 256, rng)
    assert rng.ranges[2] == (270, 270)


def test_prior_crop_draws_from_the_ranges_of_listing_2():
    rng = Scripted(highest=False)
    assert crop_prior(noise(340, 300), 256, rng).shape == (256, 256, 3)
    # room of 40: rows 15 to 24; no room in width: 0; side 256 to 288; window in 256
    assert rng.ranges == [(15, 24), (0, 0), (256, 288), (0, 0)]
    rng = Scripted(highest=True)
    crop_prior(noise(260, 261), 256, rng)
    assert rng.ranges[1:3] == [(0, 0), (256, 260)]


def test_dvae_crop_of_an_exact_square_is_the_image_or_its_mirror():
    image = noise(32, 32)
    np.testing.assert_array_equal(crop_dvae(image, 32, Scripted(highest=True)), image)
    np.testing.assert_array_equal(crop_dvae(image, 32, Scripted(highest=False)), image[:, ::-1])


def test_prior_crop_of_an_exact_square_is_always_the_image():
    image = noise(32, 32)
    for seed in range(8):
        np.testing.assert_array_equal(crop_prior(image, 32, np.random.default_rng(seed)), image)


def test_crops_repeat_for_the_same_generator_seed():
    image = noise(90, 70)
    for crop in (crop_dvae, crop_prior):
        first, again, other = (crop(image, 32, np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (20, 16)])
def test_images_smaller_than_asked_are_enlarged(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    for square in (
        crop_dvae(image, 32, np.random.default_rng(0)),
        crop_prior(image, 32, np.random.default_rng(0)),
        crop_center(image, 32),
    ):
        assert square.shape == (32, 32, 3)
        assert (square == 77).all()


def test_center_crop_equals_resizing_the_whole_image_and_cutting_the_middle():
    image = noise(90, 61)
    whole = Image.fromarray(image).resize((32, round(32 / 61 * 90)), Image.Resampling.LANCZOS)
    top = round((whole.height - 32) / 2)
    expected = np.asarray(whole)[top : top + 32].astype(int)
    assert np.abs(crop_center(image, 32) - expected).max() <= 1  # Pillow keeps boxes in f32


def test_center_crop_of_an_exact_square_is_the_image():
    np.testing.assert_array_equal(crop_center(noise(24, 24), 24), noise(24, 24))


def test_png_round_trip_is_exact(tmp_path):
    image = noise(5, 8)
    np.testing.assert_array_equal(decode(encode_png(image)), image)
    (tmp_path / "x.png").write_bytes(encode_png(image))
    np.testing.assert_array_equal(decode(tmp_path / "x.png"), image)


def test_transparency_is_laid_on_white():
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    np.testing.assert_allclose(decode(packed(red))[0, 0], [255, 127, 127], atol=1)
    clear = Image.new("LA", (2, 2), (0, 0))
    assert (decode(packed(clear)) == 255).all()


def test_palette_images_keep_their_colours_and_lose_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(packed(image))[0], [[10, 20, 30], [200, 100, 50]])
    np.testing.assert_array_equal(
        decode(packed(image, transparency=0))[0], [[255, 255, 255], [200, 100, 50]]
    )


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(packed(Image.fromarray(deep)))[0, :, 0], [0, 100, 255])


def test_camera_orientation_is_applied():
    image = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    turned = decode(packed(image, exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(noise(4, 6), -1))


def test_a_one_pixel_image_is_read_but_refused_where_size_is_asked():
    dot = encode_png(noise(1, 1))
    assert decode(dot).shape == (1, 1, 3)
    with pytest.raises(ImageError, match="1x1 pixels, but the short side must have at least 8"):
        decode(dot, min_px=8)


def test_a_truncated_file_is_named_with_the_reason(tmp_path):
    (tmp_path / "half.jpg").write_bytes(packed(Image.fromarray(noise(64, 64)), "JPEG")[:700])
    with pytest.raises(ImageError, match=r"half\.jpg: damaged or truncated .*replace the file"):
        decode(tmp_path / "half.jpg")


def test_bytes_that_are_no_image_are_refused():
    with pytest.raises(ImageError, match="image of 5 bytes: not an image in a known format"):
        decode(b"hello")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "AVIF", "MPO"])
def test_other_formats_are_read(kind, tmp_path):
    flat = Image.new("RGB", (6, 4), (0, 0, 255))
    second = {"save_all": True, "append_images": [flat]} if kind == "MPO" else {}
    (tmp_path / "x").write_bytes(packed(flat, kind, **second))
    assert np.abs(decode(tmp_path / "x") - np.array([0.0, 0, 255])).max() <= 3
    assert read_size(tmp_path / "x") == (6, 4)


def test_a_format_that_starts_programs_is_not_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(packed(Image.new("RGB", (4, 4)), "EPS"))
    with pytest.raises(ImageError, match="not an image in a known format .PNG, JPEG, WEBP, GIF"):
        decode(tmp_path / "x.jpg")
    assert read_size(tmp_path / "x.jpg") is None


def test_a_file_that_is_not_there_has_no_size(tmp_path):
    assert read_size(tmp_path / "x.jpg") is None


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2_000_000)),
        chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"a" * 2_000_000)),
        chunk(b"tEXt", b"Comment\0" + b"a" * 2_000_000),
    ],
)
@pytest.mark.parametrize("at", [33, -12])  # before and after the pixels
def test_a_png_with_many_words_is_read(extra, at):
    image = noise(5, 6)
    plain = encode_png(image)
    np.testing.assert_array_equal(decode(plain[:at] + extra + plain[at:]), image)


def announced(wide, high):
    """A PNG that says it has this size, and ends there."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("size", [(8193, 8192), (14_000, 14_000), (60_000, 60_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(size):
    data = announced(*size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"too large \(.*pixels.*\); reduce it to at most 67,1"):
        decode(data)
    assert MAX_PIXELS == 8192**2


_PEAK = """
import re, sys
from pathlib import Path
from dalle_jax.image.pixels import decode
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for name in sys.argv[1:]:
    data = Path(name).read_bytes()
    before = peak()
    decode(data)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_takes_no_more_memory_than_stated(tmp_path):
    """A palette with transparency, turned upright, is converted most often; WebP takes most."""
    side = 2500
    palette = Image.new("P", (side, side))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (side, side))
    small = packed(clear.crop((0, 0, 8, 8)), "WEBP")
    for name, data in {
        "first": small,  # what is loaded once
        "palette": packed(palette, transparency=0, exif=exif),
        "webp": packed(clear, "WEBP", quality=10, method=0, exif=exif),
    }.items():
        (tmp_path / name).write_bytes(data)
    files = [tmp_path / name for name in ("first", "palette", "webp")]
    told = subprocess.run([sys.executable, "-c", _PEAK, *files], capture_output=True, check=True)
    grown = [1024 * int(line) for line in told.stdout.split()]
    assert sum(grown[1:]) < BYTES_PER_PIXEL * side**2
    assert grown[1] > side**2  # something was measured


def test_float_images_are_refused_because_their_range_is_unknown():
    with pytest.raises(ImageError, match="32-bit grey without a known range"):
        decode(packed(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_pixel_map_reaches_a_tenth_and_nine_tenths_and_inverts():
    x = jnp.linspace(0, 1, 11)
    mapped = map_pixels(x)
    np.testing.assert_allclose([mapped[0], mapped[-1]], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(unmap_pixels(mapped), x, atol=1e-6)
    np.testing.assert_array_equal(unmap_pixels(np.array([-1.0, 2.0])), [0, 1])
