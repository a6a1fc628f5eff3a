r"""Text of any script on a sheet: in the font that comes with Pillow, or in those of the system.

A character that no font has is written as its escape, such as \u7ea2. Source: ours.
"""

import bisect
import functools
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

FONT_PX = 16
FOLDERS = (
    "~/.fonts",
    "~/.local/share/fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "${LOCALAPPDATA}/Microsoft/Windows/Fonts",
    "${WINDIR}/Fonts",
)
_SPECIAL = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono")
_NOTHING = "\uffff"  # no font has it: it is drawn as a character that is missing

Font = ImageFont.FreeTypeFont

_log = logging.getLogger(__name__)


class Typesetter:
    """Measures and draws lines of text.

    Args:
      folders: where fonts are looked for when Pillow's own lacks a character.
    """

    def __init__(self, folders: Iterable[Path]):
        self._folders = list(folders)
        self._fonts: list[Font] = [ImageFont.load_default(FONT_PX)]
        self._font_of: dict[str, Font | None] = {}
        self._escaped = False

    def legible(self, text: str) -> str:
        """Gives a text in which every character can be drawn; the others become escapes.

        What has no shape of its own (joiners, choices between shapes) is left out.
        """
        text = unicodedata.normalize("NFC", " ".join(text.split()))
        text = "".join(char for char in text if not _is_shapeless(char))
        self._find_fonts(set(text) - self._font_of.keys())
        missing = {char for char in text if self._font_of[char] is None}
        if missing and not self._escaped:
            self._escaped = True
            _log.warning(
                "no font of this system can show %r; on sheets such characters are written as "
                "escapes",
                "".join(sorted(missing))[:20],
            )
        return "".join(_escape(char) if char in missing else char for char in text)

    def wrap(self, text: str, width: int) -> list[str]:
        """Breaks a text into lines of at most `width` pixels: at spaces, else between letters."""
        lines: list[str] = []
        for word in self.legible(text).split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while len(word) > 1 and self.width(word[:width]) > width:
                end = self._fitting(word, width)
                lines.append(word[:end])
                word = word[end:]
            lines.append(word)
        return lines

    def _fitting(self, word: str, width: int) -> int:
        """How many of its letters fit, at least one."""
        counts = range(1, min(len(word), width))  # a letter takes a pixel or more
        return max(1, bisect.bisect(counts, width, key=lambda n: self.width(word[:n])))

    def width(self, line: str) -> float:
        """Pixels that a legible line takes."""
        return sum(font.getlength(part) for font, part in self._runs(line))

    def draw(self, canvas: ImageDraw.ImageDraw, corner: tuple[int, int], line: str, ink: int):
        """Draws a legible line; the corner is its upper left one."""
        left, top = corner
        baseline = top + self._fonts[0].getmetrics()[0]
        for font, part in self._runs(line):
            canvas.text((left, baseline), part, fill=ink, font=font, anchor="ls")
            left += font.getlength(part)

    def _runs(self, line: str) -> Iterator[tuple[Font, str]]:
        """Parts of a line in one font each; a space belongs to what is before it."""
        self._find_fonts(set(line) - self._font_of.keys())
        font, part = self._fonts[0], ""
        for char in line:
            wanted = font if char == " " else self._font_of[char]
            if wanted is not font:
                if part:
                    yield font, part
                font, part = wanted, ""
            part += char
        if part:
            yield font, part

    def _find_fonts(self, chars: set[str]) -> None:
        """Looks through the fonts once for all characters that are new."""
        for font in self._fonts:
            chars = self._taken(font, chars)
        if not chars:
            return
        for path in _files(self._folders):
            try:
                font = ImageFont.truetype(path, FONT_PX)
            except OSError:  # damaged, or with images of another size alone
                continue
            left = self._taken(font, chars)
            if len(left) < len(chars):
                self._fonts.append(font)
            if not (chars := left):
                return
        self._font_of |= dict.fromkeys(chars)

    def _taken(self, font: Font, chars: set[str]) -> set[str]:
        """Notes which characters a font has; gives the others."""
        nothing = bytes(font.getmask(_NOTHING))
        has = {char for char in chars if char == " " or _draws(font, char, nothing)}
        self._font_of |= dict.fromkeys(has, font)
        return chars - has


def _draws(font: Font, char: str, nothing: bytes) -> bool:
    if unicodedata.category(char) in ("Cc", "Cs"):
        return False
    if unicodedata.bidirectional(char) in ("R", "AL") and not _writes_leftwards():
        return False  # its letters would stand apart and in the wrong order
    drawn = bytes(font.getmask(char))
    return drawn != nothing and any(drawn)


def _writes_leftwards() -> bool:
    return features.check("raqm") and features.check("fribidi")


def _is_shapeless(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _files(folders: Iterable[Path]) -> list[Path]:
    """Font files below folders, plain ones first."""
    found = [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    return sorted(found, key=lambda path: any(word in path.stem.lower() for word in _SPECIAL))


@functools.cache
def typesetter() -> Typesetter:
    """The one of this process, with the fonts of its system."""
    folders = [Path(os.path.expandvars(folder)).expanduser() for folder in FOLDERS]
    return Typesetter(folder for folder in folders if folder.is_dir())
