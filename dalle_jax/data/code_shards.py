"""Codes of images, made once by a frozen codec (a dVAE or VQ-GAN) and kept in array_record files.

A record is one line of JSON (id, captions) followed by G * G codes as little-endian uint16, and as
many errors, how badly each code fits its cell, as little-endian float16. `manifest.json` is written
last, so a folder without it was never finished.
"""

import bisect
import collections
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dalle_jax import atomic
from dalle_jax.data.record import DamagedRecordError, Record, SourceError

FORMAT = 2
SHARD_RECORDS = 65_536  # about 150 MB at 32 x 32 codes
OPEN_SHARDS = 128  # most files open at a time, 0.8 MB each; macOS allows 256 descriptors in all
_MANIFEST = "manifest.json"
_AGAIN = "copy it again, or encode the images again"


def write_codes(folder: str | os.PathLike, records: Iterable[Record], *, meta: dict) -> None:
    """Writes records that hold codes, under temporary names until each file is whole.

    Args:
      folder: made if need be; shards of an earlier run there are replaced.
      records: dicts with "id", "captions", integer "codes" [G, G] and "errors" [G, G], all of one
        G.
      meta: JSON-able facts to keep; "codec" must be the fingerprint of the codec.
    Raises:
      SourceError: no records, codes of different shapes or outside uint16, or meta without "codec".
      OSError: if the disk is full.
    """
    if not meta.get("codec"):
        raise SourceError('code shards need meta["codec"], the fingerprint of the codec')
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / _MANIFEST).unlink(missing_ok=True)
    remaining = iter(records)
    first = next(remaining, None)
    if first is None:
        raise SourceError("there are no records to write; code shards need at least one")
    remaining = itertools.chain([first], remaining)
    shape = np.shape(first["codes"])
    shards = []
    while chunk := list(itertools.islice(remaining, 1)):
        chunk = itertools.chain(chunk, itertools.islice(remaining, SHARD_RECORDS - 1))
        shards.append(write_shard(root, len(shards), chunk, grid=shape[0]))
    write_manifest(root, shards, grid=shape[0], meta=meta)


def write_shard(folder: Path, number: int, records: Iterable[Record], *, grid: int) -> dict:
    """Writes one shard and gives what the manifest says of it; for several processes at once.

    Args, Raises: as for `write_codes`; grid is G.
    """
    path = folder / f"codes-{number:05d}.array_record"
    count = _write_shard(path, records, (grid, grid))
    return _described(path) | {"records": count}


def write_manifest(folder: Path, shards: list[dict], *, grid: int, meta: dict) -> None:
    """Writes what makes of shards a finished folder; see `write_shard` and `write_codes`."""
    manifest = {"format": FORMAT, "grid": grid, "shards": shards, "meta": meta}
    atomic.write(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_shard(path: Path, records: Iterable[Record], shape: tuple[int, ...]) -> int:
    count = 0
    try:
        with atomic.replaced(path) as partial:
            writer = ArrayRecordWriter(str(partial), "group_size:1")  # read in any order
            try:
                for record in records:
                    writer.write(_pack(record, shape))
                    count += 1
            finally:
                writer.close()
    except RuntimeError as error:
        raise SourceError(f"{path} could not be written: {error}") from None
    return count


def _pack(record: Record, shape: tuple[int, ...]) -> bytes:
    codes = np.asarray(record["codes"])
    if codes.ndim != 2 or codes.shape != shape or shape[0] != shape[1]:
        raise SourceError(f"{record['id']}: codes of shape {codes.shape}, expected one square grid")
    if codes.min() < 0 or codes.max() > 0xFFFF:
        raise SourceError(
            f"{record['id']}: codes reach from {codes.min()} to {codes.max()}, but shards hold 0 "
            "to 65535"
        )
    head = json.dumps({"id": record["id"], "captions": list(record["captions"])})
    errors = np.asarray(record["errors"]).reshape(shape)
    return head.encode() + b"\n" + codes.astype("<u2").tobytes() + errors.astype("<f2").tobytes()


def _described(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


class CodeSource:
    """Codes with captions, as a data source.

    Opening compares the sizes of the files; `verify` compares their contents as well.

    Args:
      folder: what `write_codes` has written.
      codec_fingerprint: of the codec the codes have to belong to.
    Raises:
      SourceError: unfinished, damaged, of another format, or made by another codec.
    """

    def __init__(self, folder: str | os.PathLike, *, codec_fingerprint: str):
        self._root = Path(folder)
        try:
            manifest = json.loads((self._root / _MANIFEST).read_text())
        except FileNotFoundError:
            raise SourceError(
                f"{self._root} holds no finished code shards ({_MANIFEST} is missing); encode the "
                "images again"
            ) from None
        if manifest["format"] != FORMAT:
            raise SourceError(
                f"{self._root} has code shards of format {manifest['format']}, but this version "
                f"reads format {FORMAT}; encode the images again"
            )
        self.meta: dict = manifest["meta"]
        if self.meta["codec"] != codec_fingerprint:
            raise SourceError(
                f"the codes in {self._root} were made by the codec {self.meta['codec'][:12]}, not "
                f"by {codec_fingerprint[:12]}; delete that folder to encode the images again"
            )
        self.grid: int = manifest["grid"]
        self._shards = manifest["shards"]
        for shard in self._shards:
            path = self._root / shard["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != shard["bytes"]:
                raise SourceError(f"{path} has {size} bytes instead of {shard['bytes']}; {_AGAIN}")
        self._ends = list(itertools.accumulate(shard["records"] for shard in self._shards))
        # A reader that falls out of this is closed when the last thread is through with it.
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Gives a record.

        Raises:
          DamagedRecordError: it is damaged.
          SourceError: the index of its shard is damaged, and with it all of that file.
          OSError: the file cannot be opened or read.
        """
        shard = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        path = self._root / self._shards[shard]["file"]
        try:
            reader = self._reader(shard, path)
        except RuntimeError as error:
            _raise_if_io(error)
            raise SourceError(f"{path} is damaged ({error}); {_AGAIN}") from None
        try:
            (data,) = reader.read([place])
        except RuntimeError as error:  # the file's own check sums; one record stops no training
            with self._lock:
                self._open.pop(shard, None)  # a reader that has failed may go on failing
            _raise_if_io(error)
            raise DamagedRecordError(f"{path}: code record {index} is damaged ({error})") from None
        head, _, codes = data.partition(b"\n")
        grids = np.frombuffer(codes, "<u2").reshape(2, self.grid, self.grid)
        return json.loads(head) | {"codes": grids[0], "errors": grids[1].view("<f2")}

    def _reader(self, shard: int, path: Path) -> ArrayRecordReader:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        if not reader.ok():
            reader.close()  # raises, and says what is wrong with the index
        with self._lock:
            self._open[shard] = reader
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return reader

    def verify(self) -> None:
        """Reads every shard and compares it with the manifest.

        Raises:
          SourceError: naming the first file whose content has changed.
        """
        for shard in self._shards:
            path = self._root / shard["file"]
            if _described(path)["sha256"] != shard["sha256"]:
                raise SourceError(f"{path} is damaged; {_AGAIN}")


def _raise_if_io(error: RuntimeError) -> None:
    """Raises OSError if a system call failed, which says nothing about what the file holds."""
    if re.search(r"\w\(\) failed: ", str(error)):
        raise OSError(str(error)) from None
