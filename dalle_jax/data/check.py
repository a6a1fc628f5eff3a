"""Looks through a folder of captioned images for what would spoil training."""

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dalle_jax.data.folder_listing import list_folder
from dalle_jax.data.record import printable
from dalle_jax.image.pixels import ImageError, decode

_BLOCK = 1024  # images handed to threads at a time
_LARGE = 4  # megapixels; a photograph of 12 takes 0.2 s of a core to read
_SHOWN = 20  # lines per kind of finding in the printed form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found; names are paths below the folder.

    Attributes:
      folder: the folder looked through.
      images: number of image files.
      captions: number of captions of images that are there.
      pairs: number of images that can be read and have a caption: what training will see.
      px: what counts as tiny.
      unreadable: image and reason.
      blank: image and the colour of all its pixels: white drawings on transparency become so.
      tiny: image and size, for a short side below `px`.
      elongated: image and size, where one side is more than twice the other: square crops lose
        what lies at the ends (the paper drops such images).
      large: image and size, above 4 megapixels: reading them may hold training back.
      captionless: images without a caption.
      missing: what has captions but no image, and why.
      duplicates: groups of images with exactly the same pixels.
    """

    folder: Path
    images: int
    captions: int
    pairs: int
    px: int
    unreadable: dict[str, str]
    blank: dict[str, str]
    tiny: dict[str, str]
    elongated: dict[str, str]
    large: dict[str, str]
    captionless: list[str]
    missing: dict[str, str]
    duplicates: list[list[str]]

    def __str__(self) -> str:
        """Lists the findings, the first of each kind by name."""
        kinds = {
            "cannot be read": _noted(self.unreadable),
            "are of one colour throughout, seen on white": _noted(self.blank),
            f"are tiny (short side below {self.px} px)": _noted(self.tiny),
            "are more than twice as long as wide": _noted(self.elongated),
            f"are larger than {_LARGE} megapixels, so that reading may hold training back; smaller "
            "copies train as well": _noted(self.large),
            "have no caption": self.captionless,
            "have captions but no image": _noted(self.missing),
            "groups have exactly the same pixels": [" = ".join(g) for g in self.duplicates],
        }
        lines = [
            f"{self.folder}: {self.images} images, {self.captions} captions, "
            f"{self.pairs} images to train on"
        ]
        for kind, found in kinds.items():
            if found:
                shown = (f"  {printable(line)}" for line in found[:_SHOWN])
                lines += [f"{len(found)} {kind}:", *shown]
            if len(found) > _SHOWN:
                lines.append(f"  ... and {len(found) - _SHOWN} more")
        if len(lines) == 1:
            lines.append("nothing to complain about")
        return "\n".join(lines)


def _noted(found: dict[str, str]) -> list[str]:
    return [f"{name}: {note}" for name, note in found.items()]


def check(
    path: str | os.PathLike,
    *,
    px: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Opens every image of a folder and reports on all of them.

    Args:
      path: the folder, in any of the forms of `list_folder`.
      px: images with a short side below this are reported as tiny.
      progress: called with images done and their number.
    Raises:
      SourceError: no folder, no images, or a caption table that cannot be read.
    """
    root = Path(path)
    listing = list_folder(root)
    unreadable: dict[str, str] = {}
    blank: dict[str, str] = {}
    tiny: dict[str, str] = {}
    elongated: dict[str, str] = {}
    large: dict[str, str] = {}
    same = collections.defaultdict(list)
    names = list(listing.captions)
    with ThreadPoolExecutor() as pool:
        looks = itertools.chain.from_iterable(
            pool.map(_look, [root / name for name in names[start : start + _BLOCK]])
            for start in range(0, len(names), _BLOCK)
        )
        for done, (name, look) in enumerate(zip(names, looks, strict=True), 1):
            if isinstance(look, str):
                unreadable[name] = look
            else:
                high, wide, digest, colour = look
                same[digest].append(name)
                if colour:
                    blank[name] = colour
                if min(high, wide) < px:
                    tiny[name] = f"{wide}x{high}"
                if max(high, wide) > 2 * min(high, wide):
                    elongated[name] = f"{wide}x{high}"
                if high * wide > _LARGE * 10**6:
                    large[name] = f"{wide}x{high}"
            if progress is not None:
                progress(done, len(names))
    return Report(
        folder=root,
        images=len(names),
        captions=sum(map(len, listing.captions.values())),
        pairs=sum(bool(listing.captions[name]) and name not in unreadable for name in names),
        px=px,
        unreadable=unreadable,
        blank=blank,
        tiny=tiny,
        elongated=elongated,
        large=large,
        captionless=[name for name in names if not listing.captions[name]],
        missing=listing.missing,
        duplicates=[group for group in same.values() if len(group) > 1],
    )


def _look(path: Path) -> tuple[int, int, str, str] | str:
    """Height, width, digest of the pixels, colour if there is but one; or what is wrong."""
    try:
        image = decode(path)
    except (ImageError, OSError) as error:
        return str(error).removeprefix(f"{printable(os.fspath(path))}: ")
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    colour = "#" + image[0, 0].tobytes().hex() if (image == image[0, 0]).all() else ""
    return *image.shape[:2], digest, colour
