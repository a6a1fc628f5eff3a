"""Files that are complete or absent: written under a temporary name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside a file, which becomes that file if no error is raised."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file; text as UTF-8."""
    with replaced(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
