"""An index of a folder of captioned images: made once, cached, and read through a memory map.

It lies in `folders` below the user's cache folder ($DALLE_JAX_CACHE, else dalle_jax below
$XDG_CACHE_HOME or ~/.cache; an empty DALLE_JAX_CACHE keeps none), under a name made of the names,
sizes and times of all files. As long as these stay the same, no caption file is read again and no
image opened.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dalle_jax import atomic
from dalle_jax.cache_folder import cache_folder
from dalle_jax.data.folder_listing import FileStamp, Listing, list_folder, scan
from dalle_jax.data.record import SourceError, printable
from dalle_jax.image.pixels import read_size

_FORMAT = 1
# A file written a moment ago may be written again within one tick of the clock: not yet cached.
_CLOCK_TICK_NS = 2 * 10**9
_TAIL = 4096  # bytes at the end of a file that tell most files of one size apart

_log = logging.getLogger("dalle_jax.data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderIndex:
    """The captioned images of a folder, in the order of their names.

    Letters: N images, G groups of files with the same bytes.

    Attributes:
      root: the folder.
      records: uint8, one line of JSON [name, captions] after the other.
      ends: int64 [N], where each line ends.
      groups: int64 [N], the number of the first image with the same bytes.
      order: int64 [G], those first images, by a hash of their names.
      cache: folder that holds these arrays; None if they are in memory alone.
    """

    root: Path
    records: np.ndarray
    ends: np.ndarray
    groups: np.ndarray
    order: np.ndarray
    cache: Path | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[str, list[str]]:
        """Gives the name and the captions of an image."""
        start = self.ends[index - 1] if index else 0
        name, captions = json.loads(self.records[start : self.ends[index]].tobytes())
        return name, captions

    def held_out(self, share: float) -> np.ndarray:
        """Takes copies of one file together, and at least one group for validation.

        Args:
          share: largest part of the images to take, but for the first group.
        Returns:
          bool [N].
        """
        sizes = np.bincount(self.groups, minlength=len(self))
        taken = np.cumsum(sizes[self.order])
        count = max(1, int(np.searchsorted(taken, share * len(self), side="right")))
        return np.isin(self.groups, self.order[:count])

    def sizes(self) -> np.ndarray:
        """Width and height of every image from the heads of the files, int32 [N, 2], cached.

        Those that cannot be read have 0 by 0.
        """
        path = self.cache / "sizes.npy" if self.cache else None
        if path and path.exists():
            return np.load(path, mmap_mode="r")
        _log.info("reading the sizes of %d images in %s; this is done once", len(self), self.root)
        with ThreadPoolExecutor() as pool:
            sizes = pool.map(lambda i: read_size(self.root / self[i][0]), range(len(self)))
            found = np.array([size or (0, 0) for size in sizes], np.int32)
        if path:
            with (
                contextlib.suppress(OSError),
                atomic.replaced(path) as partial,
                partial.open("wb") as file,
            ):
                np.save(file, found)
        return found


_ARRAYS = ("records", "ends", "groups", "order")


def open_index(folder: str | os.PathLike) -> FolderIndex:
    """Opens the index of a folder, made anew if a file there has changed since.

    Says in the log how many images have no caption, and how many captions no image.

    Raises:
      SourceError: as `list_folder`, or if no image has a caption.
    """
    root = Path(folder)
    files = scan(root)
    place = _place(root, files)
    try:
        notes = json.loads((place / "notes.json").read_text()) if place else None
    except OSError:
        notes = None
    if notes is None:
        _log.info("indexing %d files in %s; this is done once", len(files), root)
        listing = list_folder(root, files)
        index, notes = _index(root, files, listing), _notes(listing)
        newest = max(stamp.time for stamp in files.values())
        if place and len(index) and newest < time.time_ns() - _CLOCK_TICK_NS:
            index = _save(index, notes, place)
    else:
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        index = FolderIndex(root=root, cache=place, **arrays)
    for note in notes:
        _log.warning("%s: %s", root, note)
    if not len(index):
        raise SourceError(
            f"none of the images in {root} has a caption; write x.txt beside x.jpg (one caption "
            f"a line), or a captions.jsonl or captions.csv{''.join(f'; {note}' for note in notes)}"
        )
    return index


def _place(root: Path, files: Mapping[str, FileStamp]) -> Path | None:
    """Where the index of this state of a folder is cached; None for no cache."""
    cache = cache_folder()
    if cache is None:
        return None
    real = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    state = hashlib.sha256(b"%d" % _FORMAT)
    for name, stamp in files.items():
        state.update(b"%s\0%d\0%d\0" % (os.fsencode(name), *stamp))
    return cache / "folders" / real[:24] / state.hexdigest()[:24]


def _notes(listing: Listing) -> list[str]:
    """What of a folder is not used, for the log."""
    mute = [name for name, captions in listing.captions.items() if not captions]
    notes = []
    if mute:
        notes.append(
            f"{len(mute)} images without a caption are not used, such as {printable(mute[0])}"
        )
    if listing.missing:
        name, why = next(iter(listing.missing.items()))
        notes.append(
            f"{len(listing.missing)} names with captions have no image, such as "
            f"{printable(name)}: {why}"
        )
    return notes


def _index(root: Path, files: Mapping[str, FileStamp], listing: Listing) -> FolderIndex:
    captioned = {name: captions for name, captions in listing.captions.items() if captions}
    lines = [json.dumps(record).encode() for record in captioned.items()]
    names = list(captioned)
    groups = _groups(root, names, files)
    firsts = np.unique(groups).tolist()
    order = sorted(firsts, key=lambda first: _digest(os.fsencode(names[first])))
    return FolderIndex(
        root=root,
        records=np.frombuffer(b"".join(lines), np.uint8),
        ends=np.cumsum([len(line) for line in lines], dtype=np.int64),
        groups=np.array(groups, np.int64),
        order=np.array(order, np.int64),
    )


def _groups(root: Path, names: list[str], files: Mapping[str, FileStamp]) -> list[int]:
    """The number of the first file with the same bytes, for each.

    Files of one size are compared by their ends, and only those that agree there are read in full.
    """
    keys: dict[str, tuple] = {name: (files[name].size,) for name in names}
    for digest in (_tail_digest, _file_digest):
        counts = collections.Counter(keys.values())
        alike = [name for name in names if counts[keys[name]] > 1]
        with ThreadPoolExecutor() as pool:
            for name, read in zip(alike, pool.map(digest, (root / n for n in alike)), strict=True):
                keys[name] += (name,) if read is None else (read,)
    firsts: dict[tuple, int] = {}
    return [firsts.setdefault(keys[name], number) for number, name in enumerate(names)]


def _tail_digest(path: Path) -> str | None:
    """Of the last bytes of a file; None if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return _digest(file.read())
    except FileNotFoundError:
        return None


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _save(index: FolderIndex, notes: list[str], place: Path) -> FolderIndex:
    """Writes an index under a temporary name, then renames; those of earlier states go."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
        for name in _ARRAYS:
            np.save(partial / f"{name}.npy", getattr(index, name))
        (partial / "notes.json").write_text(json.dumps(notes))
        partial.rename(place)
    except OSError as error:
        if not place.exists():  # else another process was faster
            _log.info("the index of %s cannot be cached: %s", index.root, error)
            return index
    for earlier in place.parent.glob("*"):
        if earlier.name != place.name:
            shutil.rmtree(earlier, ignore_errors=True)
    return dataclasses.replace(index, cache=place)
