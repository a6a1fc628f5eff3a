"""From encoded images to square uint8 arrays, by the paper's two crop recipes, and the pixel map.

Letters: H, W height and width of an image as it came, R side of the square one asked for (`px`).
Images are uint8 [H, W, 3], RGB, 0 to 255, throughout.
"""

import io
import math
import os
import struct

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from dalle_jax.errors import UserError

RGBImage = UInt8[np.ndarray, "H W 3"]
Square = UInt8[np.ndarray, "R R 3"]
Pixels = Float[jax.Array, "..."] | Float[np.ndarray, "..."]

# The logit-Laplace density lives on (0, 1): pixels keep this distance from both ends.
PIXEL_MARGIN = 0.1

# Formats that Pillow may use; others of its readers start programs, as for PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Images with more pixels are refused before anything of them is decoded.
MAX_PIXELS = 2**26
# Memory that `decode` takes at most for each pixel, beside the file's own bytes: WebP 18, AVIF 14,
# others 10.
BYTES_PER_PIXEL = 24
_STRIP = 2**20  # pixels that are turned into RGB at a time
_PNG = b"\x89PNG\r\n\x1a\n"
_KNOWN = ", ".join(FORMATS)


class ImageError(UserError):
    """An image that cannot be used; the message is one sentence for the person who owns it."""


def decode(
    data: bytes | str | os.PathLike,
    *,
    min_px: int = 1,
    max_pixels: int = MAX_PIXELS,
    background: str = "white",
) -> RGBImage:
    """Reads an image as 8-bit RGB, upright, without transparency.

    Alpha is laid on the background; 16-bit grey keeps its upper 8 bits, rounded; palette, grey and
    CMYK become RGB; the camera's EXIF orientation is applied; of an animation the first frame
    counts. It takes at most 24 bytes of memory a pixel, 1.5 GiB for the largest image.

    Args:
      data: the encoded bytes, or the path of a file that holds them.
      min_px: smallest short side allowed, in pixels.
      max_pixels: most pixels allowed, which are counted before any is decoded.
      background: colour that shows where the image is transparent, as Pillow names it.
    Raises:
      ImageError: unreadable, truncated, without a known brightness range, too small, or too large.
      OSError: if the file cannot be read at all.
    Source: ours.
    """
    if isinstance(data, bytes):
        name = f"image of {len(data)} bytes"
    else:
        name = os.fspath(data).encode("utf-8", "backslashreplace").decode("utf-8")
        with open(data, "rb") as file:
            data = file.read()
    image = _loaded(data, name, max_pixels)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name}: 32-bit grey without a known range; save it with 8 or 16 bits a channel"
        )
    if min(image.size) < min_px:
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels, but the short side must have at "
            f"least {min_px}"
        )
    return _to_rgb(image, background)


def _loaded(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Decodes an image and turns it upright."""
    # Damaged files make Pillow's parsers raise nearly anything (OSError, SyntaxError, struct.error,
    # IndexError, ...); each of them means the same to the owner of the image.
    try:
        try:
            return _upright(data, max_pixels)
        except ValueError:
            if not data.startswith(_PNG):
                raise
            # Pillow refuses a PNG whose texts or colour profile unpack to more than a megabyte
            return _upright(_without_texts(data), max_pixels)
    except MemoryError:
        raise
    except (_TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: too large ({error}); reduce it to at most {max_pixels:,} pixels"
        ) from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({_KNOWN})") from None
    except Exception as error:
        raise ImageError(f"{name}: damaged or truncated ({error}); replace the file") from None


class _TooLarge(Exception):
    """An image of more than MAX_PIXELS."""


def _upright(data: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise _TooLarge(f"{image.width}x{image.height} pixels")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _without_texts(png: bytes) -> bytes:
    """Leaves out the chunks that hold words and colour profiles."""
    chunks, at = [png[: len(_PNG)]], len(_PNG)
    while at + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        end = at + 12 + length  # with length, kind and check sum
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            chunks.append(png[at:end])
        at = end
    return b"".join(chunks)


def _to_rgb(image: Image.Image, background: str) -> np.ndarray:
    """Converts a few rows at a time, so that what lies between takes no memory to speak of."""
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        rgb[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)), background)
    return rgb


def _strip_to_rgb(image: Image.Image, background: str) -> np.ndarray:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255 instead of scaling
        grey = np.rint(np.asarray(image) / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return np.asarray(image.convert("RGB"))


def read_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height from the head of a file; None if it is missing or no image.

    The camera's orientation is not applied.

    Raises:
      OSError: if the file is there, but cannot be opened.
    """
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                return image.size
        except Exception:  # of any kind, as in `_loaded`; decode says what is wrong
            return None


def encode_png(image: RGBImage) -> bytes:
    """Packs an image as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def area_resize(image: RGBImage, size: tuple[int, int]) -> UInt8[np.ndarray, "H_out W_out 3"]:
    """Resizes by averaging areas as TensorFlow 1 did with AREA and align_corners=True.

    The scale is (in - 1) / (out - 1), so output i averages the input over [i s, (i + 1) s); what
    reaches beyond the last pixel counts as that pixel. Values are rounded to nearest.

    Args:
      image: the image as it is.
      size: height and width wanted, in pixels, at least 1.
    Source: Ramesh et al. 2021, listings 1 and 2 (`tf.image.resize_images`).
    """
    if image.shape[:2] == tuple(size):
        return image
    H, W, C = image.shape
    low = _average_rows(image.reshape(H, W * C), size[0]).reshape(size[0], W, C)
    turned = low.swapaxes(0, 1).reshape(W, size[0] * C)
    resized = _average_rows(turned, size[1]).reshape(size[1], size[0], C).swapaxes(0, 1)
    return np.rint(np.clip(resized, 0, 255)).astype(np.uint8)


def _average_rows(x: np.ndarray, n_out: int) -> Float[np.ndarray, "n_out N"]:
    """Averages the rows [i s, (i + 1) s) of [n_in, N]; every row is read once or twice."""
    n_in = x.shape[0]
    scale = (n_in - 1) / (n_out - 1) if n_out > 1 else float(n_in)
    start = np.arange(n_out)[:, None] * scale
    first = np.minimum(start.astype(int), n_in - 1)
    left = first + np.arange(math.ceil(scale) + 1)  # out K
    right = np.where(left < n_in - 1, left + 1.0, np.inf)  # the last row goes on for ever
    overlap = np.minimum(start + scale, right) - np.maximum(start, left)
    weights = (np.maximum(overlap, 0) / scale if n_in > 1 else left == 0).astype(np.float32)
    averages = np.empty((n_out, x.shape[1]), np.float32)
    for i, at in enumerate(first[:, 0]):
        rows = x[at : at + weights.shape[1]].astype(np.float32)
        np.einsum("k,kn->n", weights[i, : len(rows)], rows, out=averages[i])
    return averages


def crop_dvae(image: RGBImage, px: int, rng: np.random.Generator) -> Square:
    """Cuts a random square out of an image for dVAE training, mirrored half of the time.

    A square of the short side anywhere, shrunk to a side drawn from 9/8 to 12/8 of `px` as far as
    the image allows, then a random `px` window of it. An image whose short side is below `px`
    is enlarged to it (Lanczos; ours, the paper has none so small).

    Source: Ramesh et al. 2021, listing 1 (written there for px = 256: 288 to 384).
    """
    H, W, _ = image.shape
    side = min(H, W)
    top, left = rng.integers(H - side + 1), rng.integers(W - side + 1)
    square = image[top : top + side, left : left + side]
    window = _shrink_and_cut(square, px, round(9 * px / 8), round(12 * px / 8), rng)
    return np.ascontiguousarray(window[:, ::-1] if rng.random() < 0.5 else window)


def crop_prior(image: RGBImage, px: int, rng: np.random.Generator) -> Square:
    """Cuts a nearly centred square out of an image for transformer training, never mirrored.

    The square of the short side lies between 3/8 and 5/8 of the free room, is shrunk to a side
    drawn from `px` to 9/8 of it, and gives a random `px` window. Images that are too small are
    enlarged as in `crop_dvae`. No mirroring, because images may hold text.

    Source: Ramesh et al. 2021, listing 2 (written there for px = 256: 256 to 288).
    """
    H, W, _ = image.shape
    side = min(H, W)
    top, left = _nearly_centred(H - side, rng), _nearly_centred(W - side, rng)
    square = image[top : top + side, left : left + side]
    return np.ascontiguousarray(_shrink_and_cut(square, px, px, round(9 * px / 8), rng))


def _nearly_centred(room: int, rng: np.random.Generator) -> int:
    lowest = 3 * room // 8
    return int(rng.integers(lowest, max(lowest + 1, 5 * room // 8)))


def _shrink_and_cut(
    square: np.ndarray, px: int, smallest: int, largest: int, rng: np.random.Generator
) -> np.ndarray:
    side = square.shape[0]
    if side < px:
        return crop_center(square, px)
    target = int(rng.integers(min(side, smallest), min(side, largest), endpoint=True))
    shrunk = area_resize(square, (target, target))
    top, left = rng.integers(target - px + 1, size=2)
    return shrunk[top : top + px, left : left + px]


def crop_center(image: RGBImage, px: int) -> Square:
    """Scales an image until its short side is `px` (Lanczos) and keeps the middle square.

    Source: OpenAI's dVAE usage notebook; used for every evaluation.
    """
    H, W, _ = image.shape
    scale = px / min(H, W)
    high, wide = round(scale * H), round(scale * W)
    top, left = round((high - px) / 2), round((wide - px) / 2)
    # Resizing only the part that remains is the same, and bounded for an image of 1 x 10,000.
    box = (left * W / wide, top * H / high, (left + px) * W / wide, (top + px) * H / high)
    resized = Image.fromarray(image).resize((px, px), Image.Resampling.LANCZOS, box=box)
    return np.array(resized)


def pad_to_square(image: RGBImage) -> UInt8[np.ndarray, "side side 3"]:
    """Lays an image in the middle of a white square of its longer side."""
    height, width = image.shape[:2]
    side = max(height, width)
    if height == width:
        return image
    padded = Image.new("RGB", (side, side), "white")
    padded.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    return np.asarray(padded)


def square(image: np.ndarray, px: int) -> Square:
    """Gives an image of side px: as it is, or by `crop_center`.

    Raises:
      UserError: if it is not uint8 with three channels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(
            f"got an image of {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3] "
            "with values from 0 to 255"
        )
    return image if image.shape[:2] == (px, px) else crop_center(image, px)


def map_pixels(x: Pixels) -> Pixels:
    """Maps pixels from [0, 1] into [0.1, 0.9], where the logit-Laplace density is finite.

    Source: Ramesh et al. 2021, appendix A.3.
    """
    return (1 - 2 * PIXEL_MARGIN) * x + PIXEL_MARGIN


def unmap_pixels(x: Pixels) -> Pixels:
    """Inverts `map_pixels`, clamped to [0, 1]."""
    return ((x - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clip(0, 1)


def decibels(
    images: UInt8[np.ndarray, "B R R 3"], reconstructed: UInt8[np.ndarray, "B R R 3"]
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """Peak signal-to-noise ratio of each image, in dB: of all of it, and of what is not white.

    10 log10(255^2 / MSE), at most 68 dB. White is what has 250 or more in every channel of
    `images`: of an emoji it is half of the image, and easy.
    """
    error = np.square(reconstructed.astype(float) - images).mean(axis=-1)  # B R R
    seen = (images < 250).any(axis=-1)
    mean = error.mean(axis=(1, 2))
    part = (error * seen).sum(axis=(1, 2)) / np.maximum(seen.sum(axis=(1, 2)), 1)
    psnr, foreground = (10 * np.log10(255**2 / np.maximum(mse, 1e-2)) for mse in (mean, part))
    return psnr, foreground
