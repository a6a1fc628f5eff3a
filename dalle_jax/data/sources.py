"""Captioned images of a folder, and several sources as one."""

import bisect
import collections
import itertools
import logging
import os
from collections.abc import Sequence

import numpy as np

from dalle_jax.data.folder_index import FolderIndex, open_index
from dalle_jax.data.folder_listing import IMAGE_SUFFIXES, TABLES, Listing, list_folder
from dalle_jax.data.record import DamagedRecordError, DataSource, Record, SourceError
from dalle_jax.data.record_filters import Filters

__all__ = [
    "IMAGE_SUFFIXES",
    "TABLES",
    "ConcatSource",
    "DamagedRecordError",
    "DataSource",
    "FolderSource",
    "Listing",
    "Record",
    "SourceError",
    "Subset",
    "folder_splits",
    "list_folder",
]

_log = logging.getLogger("dalle_jax.data")


class ConcatSource:
    """The records of several sources, one source after the other."""

    def __init__(self, *sources: DataSource):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - (self._ends[which - 1] if which else 0)]


class Subset:
    """Some records of a source.

    Args:
      source: of all of them.
      indices: of those that are kept, in their order here.
    """

    def __init__(self, source: DataSource, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]


class FolderSource:
    """The captioned images of a folder, in the order of their names.

    Images without a caption are left out (the log counts them, `dalle-jax data check` lists
    them). What the folder holds is found once: see `data/folder_index.py`.

    Args:
      path: the folder; `list_folder` says how captions are found.
      split: None for every image, or "train" or "validation", a fixed division. It goes by the
        names of the files, and files with the same bytes always stand on the same side.
      validation_share: part of the images that is kept for validation, in (0, 1).
      filters: which images and captions to leave out, on both sides.
      index: of the folder, if it is open already.
    Raises:
      SourceError: wrong split or share, or no image with a caption remains.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        validation_share: float = 0.05,
        filters: Filters | None = None,
        index: FolderIndex | None = None,
    ):
        if split not in (None, "train", "validation"):
            raise SourceError(f"a folder has the splits train and validation, not {split!r}")
        if not 0 < validation_share < 1:
            raise SourceError(f"validation_share must lie in (0, 1), got {validation_share}")
        self._index = open_index(path) if index is None else index
        self._filters = filters or Filters()
        chosen = np.ones(len(self._index), bool)
        if split is not None:
            held_out = self._index.held_out(validation_share)
            chosen = held_out if split == "validation" else ~held_out
        if not chosen.any():
            raise SourceError(
                f"too few different images in {self._index.root} to split off validation"
            )
        self._chosen = self._filtered(np.flatnonzero(chosen), split)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        name, captions = self._index[int(self._chosen[index])]
        if self._filters.of_captions:
            captions = [text for text in captions if self._filters.fault(text) is None]
        return {"id": name, "image": self._index.root / name, "captions": captions}

    def _filtered(self, chosen: np.ndarray, split: str | None) -> np.ndarray:
        """Leaves out what the filters do not want, and counts it in the log."""
        counts: collections.Counter[str] = collections.Counter()
        before, filters = len(chosen), self._filters
        if filters.max_aspect is not None:
            sizes = self._index.sizes()[chosen]
            chosen = chosen[[filters.fits(width, height) for width, height in sizes.tolist()]]
            counts["images too long or too wide"] = before - len(chosen)
        if filters.of_captions:
            captioned = []
            for number in chosen.tolist():
                faults = [filters.fault(text) for text in self._index[number][1]]
                counts.update(f"{fault} captions" for fault in faults if fault)
                captioned.append(None in faults)
            counts["images without any other caption"] = captioned.count(False)
            chosen = chosen[captioned]
        if counts:
            _log.info(
                "%s%s: %d of %d images are left after filters (left out: %s)",
                self._index.root,
                f", {split}" if split else "",
                len(chosen),
                before,
                ", ".join(f"{count} {what}" for what, count in sorted(counts.items())),
            )
        if not len(chosen):
            raise SourceError(f"no image in {self._index.root} is left after {filters}")
        return chosen


def folder_splits(
    path: str | os.PathLike, *, validation_share: float = 0.05, filters: Filters | None = None
) -> tuple[FolderSource, FolderSource]:
    """Opens both splits of a folder, training first, looking it through once.

    Args:
      path: as all other arguments, of `FolderSource`.
      validation_share: see there.
      filters: see there.
    Raises:
      SourceError: likewise.
    """
    index = open_index(path)
    train, validation = (
        FolderSource(
            path, split=split, validation_share=validation_share, filters=filters, index=index
        )
        for split in ("train", "validation")
    )
    return train, validation
