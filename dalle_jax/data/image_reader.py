"""Reads the images of a data source, skips those that cannot be used and names them.

Source: ours.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dalle_jax.data.record import DamagedRecordError, DataSource, Record, SourceError, printable
from dalle_jax.image.pixels import ImageError, decode, pad_to_square

Batch = dict[str, np.ndarray]

# Below a quarter of the side asked for, enlarging an image shows nothing but blur.
_SMALLEST_SHARE = 4
# Pauses before a record is read again after an error of the disk or network.
_RETRY_S = (0.5, 2.0, 8.0)

_log = logging.getLogger("dalle_jax.data")


class ImageReader:
    """Reads records and remembers which images cannot be used; for several threads.

    Args:
      source: images or codes with captions.
      px: side that images will be cropped to; those whose short side is below px / 4 are not used.
    """

    def __init__(self, source: DataSource, px: int):
        self._source, self._min_px = source, max(2, px // _SMALLEST_SHARE)
        self._skipped: set[str] = set()
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}  # of the record that each thread reads

    @contextmanager
    def named(self, index: int) -> Iterator[None]:
        """Adds the name of the record to any error raised inside."""
        thread = threading.get_ident()
        self._names[thread] = f"record {index}"
        try:
            yield
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(
                f"{self._names[thread]} cannot be made into an example "
                f"({type(error).__name__}: {error}); mend it or take it out"
            ) from error
        finally:
            del self._names[thread]

    def being_read(self) -> list[str]:
        """Names the records that are being read."""
        return sorted(self._names.copy().values())

    def usable(
        self, index: int, crop: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[int, Record, Batch]:
        """Finds the first record from `index` on, wrapping around, with a usable image or codes.

        Only missing or damaged records are skipped. To skip others, which a second try may read,
        would replace a good record, and a resumed run would differ from an unbroken one.
        """
        for found in itertools.chain(range(index, len(self._source)), range(index)):
            try:
                record, image = self._read_with_retries(found)
            except (ImageError, DamagedRecordError, FileNotFoundError) as error:
                self._skip(self._names[threading.get_ident()], error)
                continue
            if image is not None:
                return found, record, {"image": crop(image)}
            example = {"codes": record["codes"].astype(np.int32)}
            return found, record, example | {"errors": record["errors"].astype(np.float32)}
        raise SourceError(
            f"none of the {len(self._source)} images can be used; "
            "`dalle-jax data check FOLDER` says what is wrong with each"
        )

    def _read_with_retries(self, index: int) -> tuple[Record, np.ndarray | None]:
        """Reads a record and its image, if it has one; again after an error of the disk."""
        for attempt in itertools.count():
            try:
                return self._read(index)
            except FileNotFoundError:
                raise
            except OSError as error:
                name = self._names[threading.get_ident()]
                if attempt == len(_RETRY_S):
                    raise SourceError(
                        f"{name} could not be read, tried {attempt + 1} times "
                        f"({type(error).__name__}: {error}); see to the disk or the limits of "
                        "this machine, then start again"
                    ) from error
                pause = _RETRY_S[attempt]
                _log.warning("%s cannot be read (%s); trying again in %g s", name, error, pause)
                time.sleep(pause)

    def _read(self, index: int) -> tuple[Record, np.ndarray | None]:
        self._names[threading.get_ident()] = f"record {index}"
        record = self._source[index]
        self._names[threading.get_ident()] = printable(record["id"])
        if "codes" in record:
            return record, None
        if record.get("pad"):
            return record, pad_to_square(decode(record["image"]))
        return record, decode(record["image"], min_px=self._min_px)

    def _skip(self, name: str, error: Exception) -> None:
        with self._lock:
            if name in self._skipped:
                return
            self._skipped.add(name)
            count = len(self._skipped)
        _log.warning("image %s is left out (%d so far): %s", name, count, error)
