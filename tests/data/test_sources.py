import json

import numpy as np
import pytest

from dalle_jax.data.sources import FolderSource, SourceError, Subset, list_folder
from dalle_jax.image.pixels import encode_png


def png(shade):
    return encode_png(np.full((4, 4, 3), shade, np.uint8))


@pytest.fixture
def folder(tmp_path):
    for name, shade in {"b.png": 1, "a.JPG": 2, "deep/er/c.webp": 3, "alone.png": 4}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(shade))
    return tmp_path


def test_text_files_beside_images_give_one_caption_a_line(folder):
    (folder / "a.txt").write_text("a red apple\n\n  an apple \n")
    (folder / "b.txt").write_text("\ufeffcafé", "utf-8")
    (folder / "deep/er/c.txt").write_text("deep")
    (folder / "ghost.txt").write_text("nothing to see")
    (folder / "._a.JPG").write_bytes(b"left by another system")
    source = FolderSource(folder)
    assert [source[i]["id"] for i in range(len(source))] == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert [source[i]["captions"] for i in range(3)] == [
        ["a red apple", "an apple"],
        ["café"],
        ["deep"],
    ]
    assert source[1]["image"].read_bytes() == png(1)
    assert list_folder(folder).missing == {"ghost.txt": "no image of that name is there"}


def test_jsonl_takes_image_or_file_and_caption_or_captions(folder):
    rows = [
        {"image": "b.png", "caption": "one"},
        {"file": "./deep/er/c.webp", "captions": ["two", "three"]},
        {"image": "gone.png", "caption": "lost"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = FolderSource(folder)
    assert [source[i]["captions"] for i in range(len(source))] == [["one"], ["two", "three"]]
    assert list_folder(folder).missing == {"gone.png": "not there"}


def test_csv_rows_of_one_image_are_its_captions(folder):
    (folder / "captions.csv").write_text('image,caption\nb.png,"red, round"\nb.png,apple\na.JPG,\n')
    source = FolderSource(folder)
    assert [source[i]["captions"] for i in range(len(source))] == [["red, round", "apple"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.jsonl", '{"image": "b.png"}\n', 'line 1: expected .* got {"image": "b.png"}'),
        ("captions.jsonl", "\n[1]\n", r"line 2: expected .* got \[1\]"),
        ("captions.jsonl", "{oops\n", "line 1: expected .* got {oops"),
        ("captions.jsonl", '{"image": "b.png", "caption": 3}', "line 1: expected"),
        ("captions.csv", "file,text\n", "line 1: .* must name .* image,caption, .*; got file,text"),
        ("captions.csv", "", "must name the columns image,caption, .*; got an empty line"),
    ],
)
def test_a_wrong_line_in_a_table_is_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        FolderSource(folder)


def test_two_tables_are_one_too_many(folder):
    for name in ("captions.jsonl", "captions.csv"):
        (folder / name).write_text("")
    with pytest.raises(SourceError, match=r"holds captions\.csv and captions\.jsonl; keep one"):
        FolderSource(folder)


def test_a_folder_without_images_says_which_it_knows(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds no images \(\.jpg, \.jpeg, \.png, \.webp, "):
        FolderSource(tmp_path)


def test_a_folder_of_other_images_says_what_to_convert(tmp_path):
    for name in ("a.SVG", "b.svg", "c.heic", "a.txt", "b.txt", "c.txt", "README"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=r"\); its 2 \.svg files have to be converted to one of"):
        FolderSource(tmp_path)


def test_a_folder_without_captions_says_how_to_write_them(folder):
    with pytest.raises(SourceError, match=r"none of the images .* write x\.txt beside x\.jpg"):
        FolderSource(folder)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match="nowhere is not a folder"):
        FolderSource(tmp_path / "nowhere")


def many(folder, shades):
    for i, shade in enumerate(shades):
        (folder / f"{i:03}.png").write_bytes(png(shade))
        (folder / f"{i:03}.txt").write_text(f"number {i}")


def ids(source):
    return {source[i]["id"] for i in range(len(source))}


def test_splits_are_fixed_disjoint_and_complete(tmp_path):
    many(tmp_path, range(100))
    train, held = (ids(FolderSource(tmp_path, split=s)) for s in ("train", "validation"))
    assert train | held == ids(FolderSource(tmp_path))
    assert not train & held
    assert len(held) == 5
    assert held == ids(FolderSource(tmp_path, split="validation"))


def test_copies_of_a_file_stand_on_one_side(tmp_path):
    many(tmp_path, [i // 2 for i in range(40)])
    held = ids(FolderSource(tmp_path, split="validation", validation_share=0.3))
    assert len(held) == 12
    assert all(f"{int(name[:3]) ^ 1:03}.png" in held for name in held)


def test_one_image_cannot_be_split(tmp_path):
    many(tmp_path, [0])
    assert len(FolderSource(tmp_path, split="validation")) == 1
    with pytest.raises(SourceError, match="too few different images"):
        FolderSource(tmp_path, split="train")


def test_a_share_outside_zero_to_one_is_refused(folder):
    with pytest.raises(SourceError, match=r"validation_share must lie in \(0, 1\), got 1\.5"):
        FolderSource(folder, split="train", validation_share=1.5)


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(SourceError, match="splits train and validation, not 'val'"):
        FolderSource(folder, split="val")


def test_a_subset_has_the_chosen_records_in_their_order():
    some = Subset([{"id": name} for name in "abcd"], [3, 1])
    assert [some[i]["id"] for i in range(len(some))] == ["d", "b"]
