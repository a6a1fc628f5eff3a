"""Captioned pictures of a folder, and several sources as one."""

import bisect
import collections
import csv
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dalle_jax.data.record import DataSource, Record, SourceError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TABLES = ("captions.jsonl", "captions.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds, by name, before any picture is opened.

    Attributes:
      captions: for every picture (path below the folder, in order) its captions, maybe none.
      missing: pictures that have captions but are not there.
    """

    captions: dict[str, list[str]]
    missing: list[str]


def list_folder(folder: str | os.PathLike) -> Listing:
    """Finds pictures and their captions, in this folder and the folders below it.

    Captions stand in `captions.jsonl` ({"image": ..., "caption": ...} or "captions": [...]), or in
    `captions.csv` (a header `image,caption`; several rows of one picture are several captions), or
    beside each picture in a text file of the same name, one caption a line. Hidden files are
    passed over.

    Raises:
      SourceError: no folder, no pictures, two caption tables, or a line of one that is wrong.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder; give the folder that holds the pictures")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    pictures = [n for n in names if n.lower().endswith(PICTURE_SUFFIXES)]
    if not pictures:
        raise SourceError(f"{root} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")

    tables = [name for name in TABLES if name in names]
    if len(tables) > 1:
        raise SourceError(f"{root} holds {' and '.join(tables)}; keep one of them")
    written: dict[str, list[str]] = collections.defaultdict(list)
    if tables:
        read = _read_jsonl if tables[0].endswith(".jsonl") else _read_csv
        for name, captions in read(root / tables[0]):
            written[os.path.normpath(name).replace(os.sep, "/")] += captions
    else:
        stems = collections.defaultdict(list)
        for name in pictures:
            stems[name.rpartition(".")[0]].append(name)
        for name in names:
            if name.endswith(".txt"):
                lines = (root / name).read_text("utf-8-sig", errors="replace").splitlines()
                for picture in stems.get(name.removesuffix(".txt"), [name]):
                    written[picture] += lines
    clean = {name: [c.strip() for c in lines if c.strip()] for name, lines in written.items()}
    return Listing(
        captions={name: clean.get(name, []) for name in pictures},
        missing=sorted(set(clean) - set(pictures)),
    )


def _read_jsonl(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["image"] if "image" in row else row["file"]
            captions = row["captions"] if "captions" in row else [row["caption"]]
            if not all(isinstance(text, str) for text in (name, *captions)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise SourceError(
                f'{path}, line {number}: expected {{"image": "x.jpg", "caption": "..."}} or '
                f'"captions": ["...", ...], got {line[:80]}'
            ) from None
        yield name, captions


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        header = rows.fieldnames or []
        if not {"image", "caption"} <= set(header):
            raise SourceError(
                f"{path}: the first line must name the columns image,caption; "
                f"got {','.join(header) or 'an empty file'}"
            )
        for row in rows:
            yield row["image"], [row["caption"] or ""]


class Joined:
    """The records of several sources, one source after the other."""

    def __init__(self, *sources: DataSource):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - (self._ends[which - 1] if which else 0)]


class FolderSource:
    """The captioned pictures of a folder, in the order of their names.

    Pictures without a caption are left out (`dalle-jax data check` lists them).

    Args:
      path: the folder; `list_folder` says how captions are found.
      split: None for every picture, or "train" or "validation", a fixed division. It goes by the
        names of the files, and files with the same bytes always stand on the same side.
      validation_share: part of the pictures that is kept for validation, in (0, 1).
    Raises:
      SourceError: wrong split or share, or no picture with a caption remains.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        validation_share: float = 0.05,
    ):
        if split not in (None, "train", "validation"):
            raise SourceError(f"a folder has the splits train and validation, not {split!r}")
        if not 0 < validation_share < 1:
            raise SourceError(f"validation_share must lie in (0, 1), got {validation_share}")
        self._root = Path(path)
        captions = {name: texts for name, texts in list_folder(path).captions.items() if texts}
        if not captions:
            raise SourceError(
                f"none of the pictures in {self._root} has a caption; write x.txt beside x.jpg "
                "(one caption a line), or a captions.jsonl or captions.csv"
            )
        if split is not None:
            held_out = _validation_names(self._root, list(captions), validation_share)
            captions = {n: c for n, c in captions.items() if (n in held_out) == (split != "train")}
        if not captions:
            raise SourceError(f"too few different pictures in {self._root} to split off validation")
        self._captions = list(captions.items())

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Record:
        name, captions = self._captions[index]
        return {"id": name, "image": self._root / name, "captions": list(captions)}


def _validation_names(root: Path, names: list[str], share: float) -> set[str]:
    """Takes copies of one file together, and at least one group for validation."""
    sizes = collections.Counter((root / name).stat().st_size for name in names)
    groups = collections.defaultdict(list)
    for name in names:
        file = root / name
        alone = sizes[file.stat().st_size] == 1  # then it has no copy, and need not be read
        groups[name if alone else _digest(file.read_bytes())].append(name)
    drawn = sorted(groups.values(), key=lambda group: _digest(group[0].encode()))
    held_out: set[str] = set()
    for group in drawn:
        if held_out and len(held_out) + len(group) > share * len(names):
            break
        held_out.update(group)
    return held_out


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
