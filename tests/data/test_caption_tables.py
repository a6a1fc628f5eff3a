"""What may be written into a table, and what is refused with its line."""

import codecs
import json

import pytest

from dalle_jax.data.caption_tables import read_csv, read_jsonl, read_lines
from dalle_jax.data.record import SourceError


def rows(read, path):
    return [(row.name, row.captions) for row in read(path)]


@pytest.fixture
def table(tmp_path):
    def write(content, name="captions.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ("a.png,red", "red"),
        ("a.png,", ""),
        ('a.png,"a red, round ""apple"""', 'a red, round "apple"'),
        ('a.png, "red, round"', "red, round"),
        ('a.png,a 5" disk', 'a 5" disk'),
        ("a.png,one\u2028two\u0085three", "one\u2028two\u0085three"),
        ("a.png," + "x" * 100_000, "x" * 100_000),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_row_is_read_as_a_person_reads_it(table, line, caption, end):
    assert rows(read_csv, table(f"image,caption\n{line}{end}")) == [("a.png", [caption])]


def test_spreadsheets_write_marks_capitals_other_columns_and_empty_rows(table):
    content = "\ufeffImage,Width, Caption \r\na.png,3,red\r\n,,\r\n\r\nb.png,4,blue\r\n"
    assert rows(read_csv, table(content)) == [("a.png", ["red"]), ("b.png", ["blue"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,a green circle, on a light ground", "3 cells, but .* 2 columns; write a caption"),
        ("a.png", "1 cells, but the first line names 2 columns"),
        ('a.png,"a caption that goes on\nb.png,blue', r"not a row of CSV \(unexpected end"),
        ('a.png,"one\nb.png,two"', "not a row of CSV"),
        ('a.png,"one" two', "not a row of CSV"),
        (r'a.png,"a \"red\" one"', "not a row of CSV"),
        ("a.png,red\rb.png,blue", "holds a carriage return; end lines with line feeds"),
        ('a.png,"' + "x" * 200_000, "not a row of CSV"),
        (",red", "no image is named; got ,red"),
        ("a.png\tred", "1 cells"),
    ],
)
def test_any_other_row_is_refused_with_its_line(table, line, message):
    path = table(f"image,caption\nz.png,fine\n{line}\ny.png,fine\n")
    with pytest.raises(SourceError, match=rf"captions\.csv, line 3: {message}"):
        list(read_csv(path))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "\nimage,caption",
        "sep=,",
        "image;caption",
        "image",
        "image,caption,caption",
        "a.png,red",
    ],
)
def test_a_header_that_does_not_name_both_columns_is_refused(table, header):
    with pytest.raises(SourceError, match=r"line 1: .* must name the columns image,caption"):
        list(read_csv(table(header + "\n")))


@pytest.mark.parametrize(
    "line",
    [
        '{"image": "a.png"}',
        '{"image": "", "caption": "red"}',
        '{"caption": "red"}',
        '{"image": "a.png", "caption": 3}',
        '{"image": "a.png", "caption": null}',
        '{"image": "a.png", "captions": "red"}',
        '{"image": "a.png", "captions": ["red", null]}',
        '{"image": "a.png", "caption": "red", "captions": ["blue"]}',
        '{"image": "a.png", "image": "b.png", "caption": "red"}',
        '{"image": "a.png", "file": "b.png", "caption": "red"}',
        '{"image": ["a.png"], "caption": "red"}',
        '{"image": "a.png", "caption": "red"} {"image": "b.png", "caption": "red"}',
        '{"image": "a.png", "caption": "red"},',
        "[",
        "3",
        '"image"',
        "[" * 10_000,
    ],
)
def test_any_other_line_of_json_is_refused(table, line):
    good = json.dumps({"image": "z.png", "caption": "fine"})
    path = table(f"{good}\n\n{line}\n", "captions.jsonl")
    with pytest.raises(SourceError, match=r"captions\.jsonl, line 3: expected .* got "):
        list(read_jsonl(path))


def test_json_lines_end_at_line_feeds_alone(table):
    lines = [
        {"image": "a.png", "caption": "one\u2028two\u0085three\x1cfour", "width": 3},
        {"file": "b.png", "captions": []},
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    assert rows(read_jsonl, table(content)) == [
        ("a.png", ["one\u2028two\u0085three\x1cfour"]),
        ("b.png", []),
    ]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_byte_order_marks_are_honoured(table, encoding):
    mark = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}.get(encoding, b"")
    path = table(mark + "café\r\n日本 one\u2028two\n".encode(encoding), "x.txt")
    assert [line for _, line in read_lines(path)][:2] == ["café", "日本 one\u2028two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fine\ncafé\n".encode("cp1252"), r"x\.txt, line 2: byte 0xe9 is not UTF-8; save"),
        ("fine\ncafé\n".encode("utf-16-le"), r"x\.txt, line 1: holds a NUL character; save"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a\x00", r"x\.txt: begins with the mark of UTF-16, but"),
    ],
)
def test_other_encodings_are_refused_by_file_and_line(table, content, message):
    with pytest.raises(SourceError, match=message):
        list(read_lines(table(content, "x.txt")))
