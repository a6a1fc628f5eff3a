"""From images to codes by a frozen codec, and back: while a model trains, or once, before it.

Source: Ramesh et al. 2021, section 2.2.
"""

import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Float16, Int32, UInt8

from dalle_jax import atomic
from dalle_jax.data import code_shards
from dalle_jax.data.batches import one_epoch
from dalle_jax.data.sources import TABLES, DataSource, FolderSource, Record, SourceError
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import encode_png
from dalle_jax.models import codec as codecs
from dalle_jax.parallel.processes import is_leader, processes_where
from dalle_jax.terminal import bar
from dalle_jax.train import data_digest
from dalle_jax.train.lock import locked
from dalle_jax.train.loop import DataIterator

log = logging.getLogger(__name__)

_MEMORY = 2**30  # bytes for a batch on a device that does not say how much it has
_LARGEST = {"cpu": 32}  # images on a device; more are no faster there
_SHARE = 1 / 4  # of the memory that a device has left


class Encoder:
    """Turns images into codes on all devices of this process.

    Args:
      model: its codec encodes.
    """

    def __init__(self, model: Model):
        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(np.asarray(devices), ("images",))
        self._spread = NamedSharding(mesh, Spec("images"))
        params = jax.device_get(model.codec_params)
        self._params = jax.device_put(params, NamedSharding(mesh, Spec()))
        self._config = model.codec
        self.batch_size = len(devices) * _images_a_device(model, devices[0])
        """Most images at a time, over all devices."""
        self._devices = len(devices)

    def __call__(
        self, images: UInt8[np.ndarray, "B R R 3"]
    ) -> tuple[Int32[np.ndarray, "B G G"], Float16[np.ndarray, "B G G"]]:
        """Gives codes and errors, as `Model.codes_and_errors` does."""
        parts = range(0, len(images), self.batch_size)
        made = [self._encoded(images[i : i + self.batch_size]) for i in parts]
        codes, errors = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
        return codes.astype(np.int32), errors.astype(np.float16)

    def _encoded(self, images):
        count = len(images)
        missing = -count % self._devices
        filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        made = _encode(self._config, self._params, jax.device_put(filled, self._spread))
        return [np.asarray(x)[:count] for x in made]


_encode = jax.jit(codecs.codes_and_errors, static_argnums=0)


def _images_a_device(model: Model, device: Any) -> int:
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    memory = free * _SHARE if free > 0 else _MEMORY
    each = 4 * 4 * model.px**2 * model.codec.width  # about four feature maps live at a time
    return max(1, min(int(memory / each), _LARGEST.get(device.platform, 512)))


class EncodedBatches:
    """An iterator whose images have become codes; its position is that of the one below.

    The next batch is read and encoded while the last one is used.

    Args:
      iterator: yields dicts with uint8 "image" [B, R, R, 3].
      model: its codec encodes them.
    """

    def __init__(self, iterator: DataIterator, model: Model):
        self._iterator, self._encode = iterator, Encoder(model)
        self._state = iterator.get_state()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._coming: Future | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        """Gives the next batch, with "codes" and "errors" [B, G, G] in place of "image"."""
        coming = self._coming or self._worker.submit(self._made)
        self._coming = None
        batch, self._state = coming.result()
        self._coming = self._worker.submit(self._made)
        return batch

    def _made(self):
        batch = dict(next(self._iterator))
        codes, errors = self._encode(batch.pop("image"))
        batch |= {"codes": codes, "errors": errors.astype(np.float32)}
        return batch, self._iterator.get_state()

    def get_state(self) -> dict:
        """Gives the position after the last batch."""
        return self._state

    def set_state(self, state: dict) -> None:
        """Goes to a position."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.exception()  # it moves the iterator below
        self._iterator.set_state(state)
        self._state = state


def cached_codes(source: DataSource, model: Model, folder: Path) -> DataSource:
    """Gives a source with codes for images, written to code shards the first time it is asked.

    Every image is centre-cropped, so the prior sees one crop of each. A shard whose names,
    captions or images have changed is encoded anew. Several processes share the shards.

    Args:
      source: images with captions.
      model: its codec encodes them.
      folder: where the shards are kept.
    Raises:
      SourceError: if the shards there come from another codec.
      CheckpointError: if another run works there.
    """
    with locked(folder):
        ranges, old = _ranges(source, folder, model.codec_fingerprint)
        shard_files = _Shards(source, model, folder)
        with _together():  # begins when all have read the manifest
            mine = range(jax.process_index(), len(ranges), jax.process_count())
            written = [n for n in mine if shard_files.write_if_changed(n, ranges[n])]
        if processes_where(bool(written)) or ranges != old:
            with _together():
                if is_leader():
                    shard_files.write_manifest(ranges)
    return code_shards.CodeSource(folder, codec_fingerprint=model.codec_fingerprint)


def _ranges(source, folder, fingerprint):
    """How records are divided among shards, and how they were; another codec is refused."""
    old = None
    if (folder / "manifest.json").exists():
        old = code_shards.CodeSource(folder, codec_fingerprint=fingerprint).meta.get("ranges")
    if old is not None and old[-1][1] == len(source):
        return old, old
    most = min(code_shards.SHARD_RECORDS, math.ceil(len(source) / jax.process_count()))
    starts = range(0, len(source), most)
    return [[start, min(start + most, len(source))] for start in starts], old


@contextmanager
def _together() -> Iterator[None]:
    """Runs its body in all processes at the same time; if it fails in one, it fails in all."""
    processes_where(False)
    failed = True
    try:
        yield
        failed = False
    finally:
        others = processes_where(failed)
        if others and not failed:
            raise SourceError(f"process {others[0]} could not do its part; its log says why")


class _Shards:
    """Code shards of parts of a source, each with a note of what it was made of."""

    def __init__(self, source: DataSource, model: Model, folder: Path):
        self._source, self._model, self._folder = source, model, folder
        self._encoder: Encoder | None = None

    def write_if_changed(self, number: int, ends: list[int]) -> bool:
        """Encodes the records from one end to the other, unless their codes are there."""
        records = range(*ends)
        made_of = {
            "codec": self._model.codec_fingerprint,
            "range": ends,
            "quick": data_digest.stat_digest(self._source, records),
        }
        note = self._note(number)
        if note is not None and made_of.items() <= note.items():
            return False
        made_of["full"] = data_digest.content_digest(self._source, records)
        same = ("codec", "range", "full")
        if note is None or any(note[key] != made_of[key] for key in same):
            if self._encoder is None:
                log.info("encoding images into %s; this is done once", self._folder)
                self._encoder = Encoder(self._model)
            (self._folder / "manifest.json").unlink(missing_ok=True)  # it is whole no longer
            part = _Part(self._source, ends)
            coded = _records(part, self._encoder, self._model.px)
            shard = code_shards.write_shard(self._folder, number, coded, grid=self._model.grid)
        else:
            shard = note["shard"]  # the files have only been copied
        atomic.write(self._note_path(number), json.dumps(made_of | {"shard": shard}))
        return True

    def write_manifest(self, ranges: list[list[int]]) -> None:
        """Makes of the shards a finished folder, without those of a longer one before."""
        written = [self._note(number)["shard"] for number in range(len(ranges))]
        meta = {"codec": self._model.codec_fingerprint, "ranges": ranges}
        code_shards.write_manifest(self._folder, written, grid=self._model.grid, meta=meta)
        names = {shard["file"] for shard in written}
        for path in self._folder.glob("codes-*.array_record*"):
            if path.name.removesuffix(".json") not in names:
                path.unlink()

    def _note_path(self, number):
        return self._folder / f"codes-{number:05d}.array_record.json"

    def _note(self, number):
        try:
            return json.loads(self._note_path(number).read_text())
        except (OSError, ValueError):
            return None


class _Part:
    """Records of a source from one end to another."""

    def __init__(self, source: DataSource, ends: list[int]):
        self._source, self._records = source, range(*ends)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._records[index]]


def _records(source: DataSource, encoder: Encoder, px: int) -> Iterator[dict]:
    with bar("Encoding") as progress:
        for batch in _ahead(one_epoch(source, batch_size=encoder.batch_size, px=px)):
            grids = encoder(batch["image"])
            for index, codes, errors in zip(batch["index"], *grids, strict=True):
                record = source[int(index)]
                described = {"id": record["id"], "captions": record["captions"]}
                yield described | {"codes": codes, "errors": errors}
            progress(int(index) + 1, len(source))


def _ahead(batches: Iterator[dict]) -> Iterator[dict]:
    """Reads the next batch while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="reading") as worker:
        coming = worker.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = worker.submit(next, batches, None)
            yield batch


def cached_reconstructions(source: DataSource, model: Model, folder: Path) -> FolderSource:
    """Gives images as the codec reconstructs them, cached as a folder of PNG files.

    They are made the first time they are asked for, each from the middle square of its image.
    Several processes share the work.

    Args:
      source: images with captions.
      model: its codec reconstructs them.
      folder: where they are kept, in a folder for each codec and state of the data.
    Raises:
      CheckpointError: if another run works there.
    """
    with locked(folder):
        state = data_digest.stat_digest(source, range(len(source)))
        folder = folder / f"{model.codec_fingerprint[:12]}-{state[:12]}"
        table = folder / TABLES[0]
        if not processes_where(is_leader() and table.exists()):
            log.info("reconstructing %d images into %s; this is done once", len(source), folder)
            most = math.ceil(len(source) / jax.process_count())
            start = min(jax.process_index() * most, len(source))
            ends = [start, min(start + most, len(source))]
            with _together():
                _reconstruct(_Part(source, ends), start, model, folder)
            with _together():
                if is_leader():
                    parts = [folder / _LINES.format(i) for i in range(0, len(source), most)]
                    lines = [part.read_text(encoding="utf-8") for part in parts]
                    atomic.write(table, "".join(lines))  # last: a folder with it is complete
    return FolderSource(folder)


_LINES = ".{:08d}.lines"  # what the table says of images from one on


def _reconstruct(part, start, model, folder):
    """Writes images of a part, and what the table says of them into a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not len(part):  # fewer images than processes
        return
    encoder, lines = Encoder(model), []
    with bar("Reconstructing") as progress:
        for batch in _ahead(one_epoch(part, batch_size=encoder.batch_size, px=model.px)):
            images = model.decode(encoder(batch["image"])[0])
            for index, image in zip(batch["index"], images, strict=True):
                name = f"{start + index:08d}.png"
                (folder / name).write_bytes(encode_png(image))
                lines.append({"image": name, "captions": part[int(index)]["captions"]})
            progress(int(index) + 1, len(part))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / _LINES.format(start)).write_text(text, encoding="utf-8")
