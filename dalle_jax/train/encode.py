"""From pictures to codes by a frozen codec, and back: while a model trains, or once, before it.

Source: Ramesh et al. 2021, section 2.2.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dalle_jax.data import shards
from dalle_jax.data.batches import once
from dalle_jax.data.sources import TABLES, DataSource, FolderSource, SourceError
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import encode_png
from dalle_jax.terminal import bar
from dalle_jax.train.loop import DataIterator

log = logging.getLogger(__name__)


class EncodedBatches:
    """An iterator whose pictures have become codes; its position is that of the one below.

    Args:
      iterator: yields dicts with uint8 "image" [B, R, R, 3].
      model: its codec encodes them.
    """

    def __init__(self, iterator: DataIterator, model: Model):
        self._iterator, self._model = iterator, model

    def __next__(self) -> dict[str, np.ndarray]:
        """Gives the next batch, with "codes" and "errors" [B, G, G] in place of "image"."""
        batch = dict(next(self._iterator))
        codes, errors = self._model.codes_and_errors(batch.pop("image"))
        return batch | {"codes": codes, "errors": errors.astype(np.float32)}

    def get_state(self) -> dict:
        """Gives the position after the last batch."""
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        """Goes to a position."""
        self._iterator.set_state(state)


def encoded(source: DataSource, model: Model, folder: Path) -> DataSource:
    """Gives a source with codes for pictures, written to code shards the first time it is asked.

    Every picture is centre-cropped, so the prior sees one crop of each.

    Args:
      source: pictures with captions.
      model: its codec encodes them.
      folder: where the shards are kept.
    Raises:
      SourceError: if the shards there come from another codec, or from more or fewer pictures.
    """
    fingerprint = model.codec_fingerprint
    if not (folder / "manifest.json").exists():
        log.info("encoding %d pictures into %s; this is done once", len(source), folder)
        meta = {"codec": fingerprint, "records": len(source)}
        shards.write_codes(folder, _records(source, model), meta=meta)
    codes = shards.CodeSource(folder, codec_fingerprint=fingerprint)
    if (records := codes.meta.get("records", len(source))) != len(source):
        raise SourceError(
            f"the codes in {folder} were made of {records} pictures, but the data has "
            f"{len(source)} now; delete that folder to encode them again"
        )
    return codes


def _records(source: DataSource, model: Model) -> Iterator[dict]:
    with bar("Encoding") as progress:
        for batch in once(source, batch_size=64, px=model.px):
            grids = model.codes_and_errors(batch["image"])
            for index, codes, errors in zip(batch["index"], *grids, strict=True):
                record = source[int(index)]
                described = {"id": record["id"], "captions": record["captions"]}
                yield described | {"codes": codes, "errors": errors}
            progress(int(index) + 1, len(source))


def redrawn(source: DataSource, model: Model, folder: Path) -> FolderSource:
    """Gives pictures as the codec draws them from their codes, kept as a folder of PNG files.

    They are made the first time they are asked for, each from the middle square of its picture.

    Args:
      source: pictures with captions.
      model: its codec draws them.
      folder: where they are kept, in a folder for each codec and number of pictures.
    """
    folder = folder / f"{model.codec_fingerprint[:12]}-{len(source)}"
    table = folder / TABLES[0]
    if not table.exists():
        log.info("redrawing %d pictures into %s; this is done once", len(source), folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        with bar("Redrawing") as progress:
            for batch in once(source, batch_size=64, px=model.px):
                images = model.decode(model.encode(batch["image"]))
                for index, image in zip(batch["index"], images, strict=True):
                    name = f"{index:08d}.png"
                    (folder / name).write_bytes(encode_png(image))
                    lines.append({"image": name, "captions": source[int(index)]["captions"]})
                progress(int(index) + 1, len(source))
        partial = folder / f".{table.name}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(partial, table)  # last, so that a folder with it is whole
    return FolderSource(folder)
