"""Captions as people write them: text files, CSV and JSON Lines.

What cannot be read in one way only is refused, with the file, the line and what is allowed. Lines
end at line feeds alone: U+2028 and U+0085 belong to a caption.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dalle_jax.data.record import SourceError, printable

# UTF-32 comes first: its little-endian mark begins like that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SAVE = "save the file as UTF-8"


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      where: file and line, for messages.
      name: of the image, as it is written.
      captions: of the image, as they are written.
    """

    where: str
    name: str
    captions: list[str]


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields file and line number, for messages, and each line without its end.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
      SourceError: bytes of another encoding, or line ends of another kind, naming the line.
    """
    with path.open("rb") as file:
        start = file.read(4)
        mark = next((mark for mark in _MARKS if start.startswith(mark)), b"")
        file.seek(len(mark))
        encoding = _MARKS.get(mark, "utf-8")
        lines = file if encoding == "utf-8" else _decoded(path, file.read(), encoding)
        for number, line in enumerate(lines, 1):
            where = f"{printable(str(path))}, line {number}"
            try:
                text = line if isinstance(line, str) else line.decode("utf-8")
            except UnicodeDecodeError as error:
                wrong = line[error.start]
                raise SourceError(f"{where}: byte 0x{wrong:02x} is not UTF-8; {_SAVE}") from None
            if "\0" in text:
                raise SourceError(f"{where}: holds a NUL character; {_SAVE}")
            text = text.removesuffix("\n").removesuffix("\r")
            if "\r" in text:
                raise SourceError(f"{where}: holds a carriage return; end lines with line feeds")
            yield where, text


def _decoded(path: Path, data: bytes, encoding: str) -> list[str]:
    try:
        return data.decode(encoding).split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{printable(str(path))}: begins with the mark of {encoding[:-3].upper()}, but byte "
            f"{error.start} is not; {_SAVE}"
        ) from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the lines {"image": ..., "caption": ...}; "file" and "captions": [...] are read too.

    Raises:
      SourceError: naming a line that is anything else.
    """
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
            (name,) = (row[key] for key in ("image", "file") if key in row)
            (given,) = (row[key] for key in ("caption", "captions") if key in row)
            captions = given if "captions" in row else [given]
            if not isinstance(captions, list):
                raise TypeError
            if not name or not all(isinstance(text, str) for text in (name, *captions)):
                raise TypeError
        except (ValueError, TypeError, RecursionError):
            raise SourceError(
                f'{where}: expected {{"image": "x.jpg", "caption": "..."}} or "captions": '
                f'["...", ...], got {line[:80]}'
            ) from None
        yield Row(where, name, captions)


def _without_repeats(pairs: list[tuple]) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError
    return row


def read_csv(path: Path) -> Iterator[Row]:
    """Yields the rows of a table with the columns image and caption, and maybe others.

    Every line is a row, so that a quote which is never closed does not swallow the rows after it.

    Raises:
      SourceError: naming a line that is no such row.
    """
    lines = read_lines(path)
    where, header = next(lines, (f"{path}, line 1", ""))
    columns = [cell.strip().lower() for cell in _cells(where, header)]
    if columns.count("image") != 1 or columns.count("caption") != 1:
        raise SourceError(
            f"{where}: the first line must name the columns image,caption, each once and with a "
            f"comma between; got {header or 'an empty line'}"
        )
    image, caption = columns.index("image"), columns.index("caption")
    for where, line in lines:
        cells = _cells(where, line)
        if not any(cell.strip() for cell in cells):  # spreadsheets write commas alone
            continue
        if len(cells) != len(columns):
            raise SourceError(
                f"{where}: {len(cells)} cells, but the first line names {len(columns)} columns; "
                f'write a caption that has commas in quotes ("a, b"); got {line[:80]}'
            )
        if not cells[image].strip():
            raise SourceError(f"{where}: no image is named; got {line[:80]}")
        yield Row(where, cells[image].strip(), [cells[caption]])


def _cells(where: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True, skipinitialspace=True), [])
    except csv.Error as error:
        raise SourceError(
            f"{where}: not a row of CSV ({error}); a caption in quotes ends on its own line, and a "
            f'quote inside it is written twice (""); got {line[:80]}'
        ) from None
