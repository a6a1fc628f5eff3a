"""What a captioned image looks like to training, and what may be wrong with one.

A record is a dict with "id" (str), "image" (bytes or path of an image file) or "codes"
(uint16 [G, G]), and "captions" (list of str, at least one, the first being the primary one).
If it has "pad" (True), the image is laid on a white square before anything is cut out of it.
"""

from typing import Any, Protocol, runtime_checkable

from dalle_jax.errors import UserError

Record = dict[str, Any]


class SourceError(UserError):
    """Data that cannot be trained on as it is; the message says what to change."""


class DamagedRecordError(ValueError):
    """One record that is damaged where it is stored; training goes on without it."""


@runtime_checkable
class DataSource(Protocol):
    """Anything with a length and records by number: the seam for other storage.

    A record whose file is missing raises FileNotFoundError, one that is damaged DamagedRecordError;
    training leaves both out. Any other OSError is the disk's, and stops training if it stays.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def printable(name: str) -> str:
    """A name for messages: bytes of a file name that are not UTF-8 are written as codes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
