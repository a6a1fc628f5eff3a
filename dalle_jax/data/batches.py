"""Batches for training and for evaluation, from any data source.

Letters: B examples of a batch on this process, R pixel side, P text positions (a batch holds the
P - 1 caption slots), G grid side.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from dalle_jax.data.image_reader import Batch, ImageReader
from dalle_jax.data.record import DataSource, SourceError
from dalle_jax.image.pixels import crop_center, crop_dvae, crop_prior
from dalle_jax.text.bpe import Tokenizer

_CROPS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "dvae": crop_dvae,
    "prior": crop_prior,
    "center": lambda image, px, rng: crop_center(image, px),
}
# A batch that takes longer than this gets a line in the log, so that a dead disk is noticed.
_SLOW_S = 60.0
# A run that waits for data for this share of an interval is limited by reading. A smaller share
# says little: the host also waits while the device works on earlier batches.
_READING_BOUND, _INTERVAL_S = 0.75, 30.0

_log = logging.getLogger("dalle_jax.data")


def batches(
    source: DataSource,
    *,
    batch_size: int,
    seed: int,
    px: int,
    crop: str,
    tokenizer: Tokenizer | None = None,
    text_length: int | None = None,
    bpe_dropout: float = 0.0,
    caption_dropout: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> "Batches":
    """Yields shuffled batches without end; every epoch shows each record once, in a new order.

    All that is random in an example (crop, caption, dropout) depends on the seed, the epoch and the
    record alone, and the k-th batch of all processes together holds the same examples however many
    processes there are. An image that cannot be used is logged once, and the next record of the
    source replaces it. A batch that takes more than a minute is logged, with the records that are
    being read.

    Args:
      source: images or codes with captions.
      batch_size: examples of one step over all processes; a multiple of `process_count`.
      seed: any non-negative number below 2**32.
      px: side R of the images; those whose short side is below R / 4 are not used.
      crop: "dvae" (listing 1, mirrors), "prior" (listing 2) or "center".
      tokenizer: turns one caption of each record, each equally often, into ids; None for no text.
      text_length: P, the start-of-text position included, so that captions have P - 1 slots.
      bpe_dropout: chance in [0, 1] that a merge is skipped; 0.1 in the paper.
      caption_dropout: share in [0, 1] of examples whose caption is left empty, for guidance.
      process_index: which part of the batch this process makes, below `process_count`.
      process_count: processes that train together.
      threads: batches made ahead at the same time; 0 to make each when it is asked for.
    Returns:
      dicts with uint8 "image" [B, R, R, 3], or int32 "codes" and float32 "errors" [B, G, G] if the
      source holds codes, and int32 "text" [B, P - 1] with a tokenizer. `get_state()` is a small
      JSON-able dict.
    Raises:
      SourceError: if an option is out of range, or (when a batch is asked for) if none of the
        images can be used or a record fails otherwise, which is named.
    Source: Ramesh et al. 2021, listings 1 and 2; the sampling of captions is ours.
    """
    _check(source, batch_size, tokenizer, text_length)
    if crop not in _CROPS:
        raise SourceError(f"there is no crop {crop!r}; choose from {', '.join(_CROPS)}")
    if batch_size % process_count:
        raise SourceError(f"a batch of {batch_size} cannot be shared by {process_count} processes")
    for name, chance in {"bpe_dropout": bpe_dropout, "caption_dropout": caption_dropout}.items():
        if not 0 <= chance <= 1:
            raise SourceError(f"{name} must lie in [0, 1], got {chance}")
    reader = ImageReader(source, px)

    # Repeating before the processes divide the examples keeps their epochs aligned when the source
    # does not divide evenly.
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    part = ProcessSlice(order, batch_size, process_index, process_count)

    def make_example(step: int, index: int) -> Batch:
        epoch = part.position(step) // len(source)
        rng = np.random.default_rng([seed, epoch, index])
        # these come first, so that text does not depend on the crop or the image
        use_caption, which, bpe_seed = rng.random(), rng.random(), rng.integers(2**31)
        with reader.named(index):
            _, record, example = reader.usable(index, lambda image: _CROPS[crop](image, px, rng))
            if tokenizer is not None:
                captions = record["captions"]
                shown = use_caption >= caption_dropout
                caption = captions[int(which * len(captions))] if shown else ""
                example["text"] = tokenizer.encode(
                    [caption], length=text_length - 1, dropout=bpe_dropout, seeds=[int(bpe_seed)]
                )[0]
        return example

    examples = part.map_with_index(make_example)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(examples.batch(batch_size // process_count).to_iter_dataset(options))
    return Batches(iterator, reader.being_read)


class Batches:
    """The batches of an iterator; logs when reading is too slow.

    Args:
      iterator: the batches.
      being_read: gives the names of the records that threads are working on.
    """

    def __init__(self, iterator: grain.DatasetIterator, being_read: Callable[[], list[str]]):
        self._iterator, self._being_read = iterator, being_read
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="waiting for data")
        self._interval_s, self._interval_start = _INTERVAL_S, time.monotonic()
        self._batches, self._waited_s = 0, 0.0  # in this interval

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Gives the next batch."""
        start, arrived = time.monotonic(), threading.Event()
        self._watcher.submit(self._watch, arrived)
        try:
            return next(self._iterator)
        finally:
            arrived.set()
            if (waited := time.monotonic() - start) > _SLOW_S:
                _log.info("the data came after %d s", waited)
            self._count(waited)

    def _count(self, waited: float) -> None:
        """Warns if most of an interval was spent waiting; intervals grow: few warnings."""
        self._batches, self._waited_s = self._batches + 1, self._waited_s + waited
        elapsed = time.monotonic() - self._interval_start
        if elapsed < self._interval_s:
            return
        if self._waited_s > _READING_BOUND * elapsed:
            _log.warning(
                "reading holds this run back: %d of the last %d s went into waiting for data, "
                "%.0f ms a batch; smaller copies of large images help most, then more threads "
                "or a faster disk (`dalle-jax data check FOLDER` lists large images)",
                self._waited_s,
                elapsed,
                1000 * self._waited_s / self._batches,
            )
            self._interval_s *= 4
        self._batches, self._waited_s, self._interval_start = 0, 0.0, time.monotonic()

    def _watch(self, arrived: threading.Event) -> None:
        waited, pause = 0.0, _SLOW_S
        while not arrived.wait(pause):
            waited += pause
            names = ", ".join(self._being_read()) or "nothing"
            _log.warning("waiting for data for %d s; being read now: %s", waited, names)
            pause = waited  # the next line when it has taken twice as long

    def get_state(self) -> dict:
        """Gives the position after the last batch, JSON-able."""
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        """Goes to a position."""
        self._iterator.set_state(state)


class ProcessSlice(grain.MapDataset):
    """The examples that one process puts into each batch.

    They follow each other in the batch, so that its order is the same for any number of processes.

    Args:
      examples: all of them, in order.
      batch_size: examples of a batch, over all processes.
      process_index: which process this is.
      process_count: how many there are.
    """

    def __init__(
        self, examples: grain.MapDataset, batch_size: int, process_index: int, process_count: int
    ):
        super().__init__(examples)
        self._examples = examples
        self._batch_size, self._part = batch_size, batch_size // process_count
        self._first = process_index * self._part

    def __len__(self) -> int:
        """Counts the examples of this process, below 2**53 since grain divides in floats."""
        return min(len(self._examples) // self._batch_size * self._part, 2**53)

    def __getitem__(self, step: int) -> Any:
        """Gives one of them."""
        return self._examples[self.position(step)]

    def position(self, step: int) -> int:
        """Where the example of this process's step stands among those of all."""
        batch, place = divmod(step, self._part)
        return batch * self._batch_size + self._first + place


def one_epoch(
    source: DataSource,
    *,
    batch_size: int,
    px: int,
    tokenizer: Tokenizer | None = None,
    text_length: int | None = None,
) -> Iterator[Batch]:
    """Yields every record once and in order, for evaluation; the last batch may be smaller.

    Images are cropped in the middle, captions are the primary ones. Unusable images are named
    in the log and left out, so "index" says which records a batch holds.

    Args:
      source: images or codes with captions.
      batch_size: most examples in a batch.
      px: side R of the images.
      tokenizer: turns captions into ids; None for no text.
      text_length: P, as in `batches`.
    Returns:
      dicts as from `batches`, and int32 "index" [B] into the source.
    Raises:
      SourceError: if an option is out of range, or none of the images can be used.
    """
    _check(source, batch_size, tokenizer, text_length)
    return _once(source, batch_size, px, tokenizer, text_length)


def _once(source, batch_size, px, tokenizer, text_length) -> Iterator[Batch]:
    reader = ImageReader(source, px)
    waiting: list[Batch] = []
    index = 0
    while index < len(source):
        with reader.named(index):
            found, record, example = reader.usable(index, lambda image: crop_center(image, px))
            if found < index:  # wrapped around: only unusable records were left
                break
            example["index"] = np.int32(found)
            if tokenizer is not None:
                example["text"] = tokenizer.encode(record["captions"][:1], length=text_length - 1)[
                    0
                ]
        waiting.append(example)
        index = found + 1
        if len(waiting) == batch_size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(examples: list[Batch]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _check(source: DataSource, batch_size: int, tokenizer: Any, text_length: int | None) -> None:
    if len(source) == 0:
        raise SourceError("the data source is empty; it needs at least one captioned image")
    if batch_size < 1:
        raise SourceError(f"batch_size must be at least 1, got {batch_size}")
    if tokenizer is not None and (text_length is None or text_length < 2):
        raise SourceError(
            f"text_length must be at least 2 (start of text and one slot), got {text_length}"
        )
