"""What a folder holds: images, and the captions that belong to them."""

import collections
import dataclasses
import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dalle_jax.data.caption_tables import read_csv, read_jsonl, read_lines
from dalle_jax.data.record import SourceError, printable
from dalle_jax.text.caption import normalize_caption

IMAGE_SUFFIXES = (*(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),)
TABLES = ("captions.jsonl", "captions.csv")
_CAPTIONS = (".txt", ".jsonl", ".csv")
_KINDS = ", ".join(IMAGE_SUFFIXES)
_OTHER = f"not a kind of image that is read ({_KINDS})"


class FileStamp(NamedTuple):
    """What tells a changed file: its size in bytes and the time of its last change in ns."""

    size: int
    time: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds, by name, before any image is opened.

    Attributes:
      captions: for every image (path below the folder, in order) its captions, maybe none.
      missing: what captions are written for but is not there, and why it is not found.
    """

    captions: dict[str, list[str]]
    missing: dict[str, str]


def scan(folder: str | os.PathLike) -> dict[str, FileStamp]:
    """Finds all files in a folder and below it, in the order of their names.

    Hidden files and folders are passed over. Links to folders outside are followed, each folder
    once; a link to nothing counts as an empty file.

    Raises:
      SourceError: if it is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder; give the folder that holds the images")
    found: dict[str, FileStamp] = {}
    top = os.path.realpath(root)
    seen = {top}
    waiting = collections.deque([("", False)])
    while waiting:  # real folders first, so that a link to one of them adds nothing
        name, linked = waiting.popleft()
        if linked:
            real = os.path.realpath(root / name)
            if real in seen or os.path.commonpath([real, top]) == real:
                continue
            seen.add(real)
        with os.scandir(root / name) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = posixpath.join(name, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    seen.add(os.path.realpath(entry.path))
                    waiting.appendleft((below, False))
                elif entry.is_dir():
                    waiting.append((below, True))
                elif entry.is_file():
                    state = entry.stat()
                    found[below] = FileStamp(state.st_size, state.st_mtime_ns)
                elif entry.is_symlink():
                    found[below] = FileStamp(0, 0)
    return dict(sorted(found.items()))


def list_folder(folder: str | os.PathLike, files: Iterable[str] | None = None) -> Listing:
    """Finds images and their captions, in this folder and the folders below it.

    Captions stand in `captions.jsonl` ({"image": ..., "caption": ...} or "captions": [...]), or in
    `captions.csv` (a header `image,caption`; several rows of one image are several captions), or
    beside each image x.jpg in x.txt or x.jpg.txt, one caption a line. Names match whatever their
    Unicode form, and in upper or lower case. Hidden files are passed over.

    Args:
      folder: to look through.
      files: what `scan` has found there, if it is known.
    Raises:
      SourceError: no folder, no images, two caption tables, or a line of one that is wrong.
    """
    root = Path(folder)
    names = list(scan(root) if files is None else files)
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise SourceError(f"{root} holds no images ({_KINDS}){_most_common_kind(names)}")
    tables = [name for name in names if name.lower() in TABLES]
    if len(tables) > 1:
        raise SourceError(f"{root} holds {' and '.join(tables)}; keep one of them")
    captions: dict[str, list[str]] = {name: [] for name in images}
    missing: dict[str, str] = {}
    if tables:
        known = _Names(images)
        read = read_jsonl if tables[0].lower().endswith(".jsonl") else read_csv
        for row in read(root / tables[0]):
            image = _of_row(root, row.name, row.where, known)
            if image is None:
                missing[row.name] = _reason(root, row.name, set(names))
            else:
                captions[image] += row.captions
    else:
        _read_text_files(root, names, captions, missing)
    clean = {
        name: [text for text in map(normalize_caption, texts) if text]
        for name, texts in captions.items()
    }
    return Listing(captions=clean, missing=dict(sorted(missing.items())))


def _most_common_kind(names: list[str]) -> str:
    """What most files of a folder without images are, such as .heic or .svg, and what to do."""
    kinds = collections.Counter(posixpath.splitext(name)[1].lower() for name in names)
    kinds = collections.Counter({k: n for k, n in kinds.items() if k not in ("", *_CAPTIONS)})
    if not kinds:
        return ""
    kind, number = kinds.most_common(1)[0]
    return f"; its {number} {printable(kind)} files have to be converted to one of these first"


class _Names:
    """Finds names in spite of another Unicode form or case."""

    def __init__(self, names: Iterable[str]):
        self._alike = collections.defaultdict(list)
        for name in names:
            self._alike[_key(name)].append(name)

    def like(self, name: str) -> list[str]:
        """All names that differ in nothing else; the exact one alone if it is there."""
        alike = self._alike.get(_key(name), [])
        return [name] if name in alike else alike


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _of_row(root: Path, name: str, where: str, known: _Names) -> str | None:
    """The image that a line of a table means."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        if os.path.isabs(written):
            written = os.path.relpath(
                os.path.join(os.path.realpath(os.path.dirname(written)), os.path.basename(written)),
                os.path.realpath(root),
            )
        alike = known.like(posixpath.normpath(written))
        if len(alike) > 1:
            raise SourceError(f"{where}: {name} may be {' or '.join(alike)}; write it exactly")
        if alike:
            return alike[0]
    return None


def _reason(root: Path, name: str, files: set[str]) -> str:
    """Why there is no image of this name."""
    written = posixpath.normpath(name.replace("\\", "/"))
    if os.path.isabs(written) or name[1:3] in (":\\", ":/"):
        return "a path outside of the folder; write paths that begin in it"
    if written.startswith("../"):
        return "leads out of the folder"
    if any(part.startswith(".") for part in written.split("/")):
        return "hidden files are passed over"
    if written in files or (root / written).is_file():
        return _OTHER
    return "not there"


def _read_text_files(
    root: Path, names: list[str], captions: dict[str, list[str]], missing: dict[str, str]
) -> None:
    """Adds the lines of x.txt and x.jpg.txt to the captions of x.jpg."""
    stems = collections.defaultdict(list)
    for image in captions:
        stems[image.rpartition(".")[0]].append(image)
    full, without = _Names(captions), _Names(stems)
    others = {
        name.rpartition(".")[0]: name
        for name in names
        if name not in captions and not name.lower().endswith(".txt")
    }
    for name in names:
        if not name.lower().endswith(".txt"):
            continue
        stem = name[: -len(".txt")]
        alike = full.like(stem)
        alike += [image for found in without.like(stem) for image in stems[found]]
        if not alike:
            missing[name] = "no image of that name is there"
            if other := others.get(stem):
                missing[name] = f"{printable(other)} is {_OTHER}"
        lines = [line for _, line in read_lines(root / name)] if alike else []
        for image in alike:
            captions[image] += lines
