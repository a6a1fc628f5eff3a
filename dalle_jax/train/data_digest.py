"""What tells one state of the data from another: names, captions and images of its records.

Source: ours.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dalle_jax.data.sources import DataSource


def stat_digest(source: DataSource, records: Iterable[int]) -> str:
    """Digest of names, captions, and of the size and time of each image's file.

    It changes with the data, but also when files are copied without their times.
    """
    return _digest(source, records, _stamp)


def content_digest(source: DataSource, records: Iterable[int]) -> str:
    """Digest of names, captions, and of the bytes of each image's file."""
    return _digest(source, records, _bytes)


def captions_digest(source: DataSource) -> str:
    """Digest of all captions, in their order."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(json.dumps(list(source[i]["captions"])).encode())
    return digest.hexdigest()


def _digest(source, records, of_image):
    digest = hashlib.sha256()
    for i in records:
        record = source[i]
        digest.update(json.dumps([record["id"], list(record["captions"])]).encode())
        digest.update(of_image(record["image"]))
    return digest.hexdigest()


def _stamp(image: Any) -> bytes:
    if isinstance(image, bytes):
        return _hash(image)
    try:
        stat = os.stat(image)
    except OSError as error:
        return str(error.errno).encode()
    return f"{stat.st_size} {stat.st_mtime_ns}".encode()


def _bytes(image: Any) -> bytes:
    if isinstance(image, bytes):
        return _hash(image)
    try:
        return _hash(Path(image).read_bytes())
    except OSError as error:
        return str(error.errno).encode()


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
