import json
import logging
import os

import numpy as np
import pytest

from dalle_jax.data import folder_index
from dalle_jax.data.batches import batches
from dalle_jax.data.folder_index import open_index
from dalle_jax.data.record_filters import PAPER, Filters, is_boilerplate
from dalle_jax.data.sources import FolderSource, SourceError, folder_splits
from dalle_jax.image.pixels import encode_png


def png(shade, high=4, wide=4):
    return encode_png(np.full((high, wide, 3), shade, np.uint8))


def settle(folder):
    """Makes all files a day old, since those of this moment may change unnoticed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            then = os.stat(path).st_mtime - 86_400
            os.utime(path, (then, then))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02}.png").write_bytes(png(i // 2))
        (root / f"{i:02}.txt").write_text(f"number {i}\nn {i}")
    settle(root)
    return root


def records(source):
    return [source[i] for i in range(len(source))]


def test_a_folder_is_looked_through_once(folder, monkeypatch):
    first = [records(split) for split in folder_splits(folder, validation_share=0.3)]

    def never(*_):
        raise AssertionError("read again")

    for work in ("list_folder", "_tail_digest", "_file_digest"):
        monkeypatch.setattr(folder_index, work, never)
    again = [records(split) for split in folder_splits(folder, validation_share=0.3)]
    assert again == first
    assert [len(split) for split in again] == [28, 12]
    assert first[0][0]["captions"][1].startswith("n ")


@pytest.mark.parametrize("change", ["caption", "added", "removed", "renamed", "letters"])
def test_any_change_in_the_folder_is_seen(folder, change):
    FolderSource(folder)
    if change == "caption":
        (folder / "00.txt").write_text("another")
    elif change == "added":
        (folder / "40.png").write_bytes(png(99))
        (folder / "40.txt").write_text("new")
    elif change == "removed":
        (folder / "07.txt").unlink()
    elif change == "renamed":
        (folder / "00.txt").rename(folder / "00.png.txt")
    else:  # as long as before
        (folder / "00.txt").write_text("Number 0\nN 0")
    settle(folder)
    names = {"added": 41, "removed": 39}
    captions = {"caption": ["another"], "letters": ["Number 0", "N 0"]}
    source = FolderSource(folder)
    assert len(source) == names.get(change, 40)
    assert source[0]["captions"] == captions.get(change, ["number 0", "n 0"])
    kept = folder_index._place(folder, folder_index.scan(folder))
    assert [place.name for place in kept.parent.iterdir()] == [kept.name]  # the old one is gone


def test_an_index_that_another_process_has_kept_first_is_taken(folder):
    index = open_index(folder)
    again = folder_index._save(index, [], index.cache)
    assert again.cache == index.cache
    assert list(index.cache.parent.iterdir()) == [index.cache]


def test_files_of_this_moment_are_not_trusted_to_stay(folder, tmp_path):
    (folder / "00.txt").write_text("a b c")
    FolderSource(folder)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache", ["", "/dev/null/nowhere"])
def test_without_a_cache_all_is_held_in_memory(folder, monkeypatch, cache):
    monkeypatch.setenv("DALLE_JAX_CACHE", cache)
    assert len(FolderSource(folder)) == 40


def test_only_files_that_may_be_copies_are_read_whole(folder, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("00.png", "01.png"):  # of one size, but with other ends
        (folder / name).write_bytes(rng.bytes(10_000))
    (folder / "02.png").write_bytes(b"0" * 9_000 + b"e" * 5_000)
    (folder / "03.png").write_bytes(b"1" * 9_000 + b"e" * 5_000)
    (folder / "04.png").write_bytes(b"alone")
    for i in range(5, 40):
        (folder / f"{i:02}.png").unlink()
    read = []
    usual = folder_index._file_digest
    monkeypatch.setattr(folder_index, "_file_digest", lambda p: read.append(p.name) or usual(p))
    assert open_index(folder).groups.tolist() == [0, 1, 2, 3, 4]
    assert sorted(read) == ["02.png", "03.png"]


@pytest.mark.parametrize(
    ("share", "held"),
    [(0.05, [6, 7]), (0.2, [2, 3, 4, 5, 6, 7, 38, 39]), (0.19, [2, 3, 4, 5, 6, 7])],
)
def test_the_split_is_that_of_earlier_versions(folder, share, held):
    """Runs that were begun before must go on with the same images."""
    validation = FolderSource(folder, split="validation", validation_share=share)
    assert [int(record["id"][:2]) for record in records(validation)] == held


def test_what_is_not_used_is_counted_in_the_log_at_every_start(folder, caplog):
    (folder / "00.txt").unlink()
    (folder / "01.txt").rename(folder / "ghost.txt")
    settle(folder)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dalle_jax.data"):
            FolderSource(folder)
        assert "2 images without a caption are not used, such as 00.png" in caplog.text
        assert "1 names with captions have no image, such as ghost.txt: no image" in caplog.text


def test_names_that_are_not_utf_8_reach_the_batches(folder):
    for name in (b"caf\xe9.png", b"caf\xe9.txt"):
        (folder / os.fsdecode(name)).write_bytes(png(7) if name.endswith(b"png") else b"coffee")
    settle(folder)
    for _ in range(2):  # new and kept
        source = FolderSource(folder)
        assert source[len(source) - 1]["id"] == os.fsdecode(b"caf\xe9.png")
    json.dumps(source[len(source) - 1]["id"]).encode()
    batch = next(batches(source, batch_size=41, seed=0, px=4, crop="center", threads=0))
    assert len(batch["image"]) == 41
    assert all(len(FolderSource(folder, split=split)) for split in ("train", "validation"))


@pytest.fixture
def mixed(folder):
    for path in folder.iterdir():
        path.unlink()
    for name, (size, text) in {
        "good": ((4, 8), "a red apple\nred"),
        "long": ((4, 9), "a long apple"),
        "tall": ((9, 4), "a tall apple"),
        "short": ((4, 4), "apple"),
        "dated": ((4, 4), "Photographed on 3 May 2010"),
    }.items():
        (folder / f"{name}.png").write_bytes(png(len(name), *size))
        (folder / f"{name}.txt").write_text(text)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a broken apple")
    settle(folder)
    return folder


def test_the_papers_filters_leave_out_and_count(mixed, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "dalle_jax.data"):
        source = FolderSource(mixed, filters=PAPER)
    # what cannot be read is left out by name, when it is used
    assert {record["id"]: record["captions"] for record in records(source)} == {
        "broken.png": ["a broken apple"],
        "good.png": ["a red apple"],
    }
    assert (
        "2 of 6 images are left after filters (left out: 1 boilerplate captions, 2 images too "
        "long or too wide, 2 images without any other caption, 2 short captions)"
    ) in caplog.text
    monkeypatch.setattr(folder_index, "read_size", None)  # the sizes are kept as well
    assert len(FolderSource(mixed, filters=PAPER)) == 2


def test_nothing_is_left_out_unless_it_is_asked_for(mixed, caplog):
    with caplog.at_level(logging.INFO, "dalle_jax.data"):
        assert len(FolderSource(mixed)) == len(FolderSource(mixed, filters=Filters())) == 6
    assert "filters" not in caplog.text


def test_filters_that_leave_nothing_say_so(mixed):
    with pytest.raises(SourceError, match=r"no image in .* is left after Filters\(.*words=9"):
        FolderSource(mixed, filters=Filters(min_caption_words=9))


@pytest.mark.parametrize(
    ("caption", "boilerplate"),
    [
        ("Photographed on 2010-05-03", True),
        ("photo taken 5/3/2010", True),
        ("Image taken on May 3rd, 2010 at 10:30 pm", True),
        ("image created 3 of May 2010.", True),
        ("Oct. 2010", True),
        ("a cat, photographed on 2010-05-03", False),
        ("the 4th of July parade", False),
        ("a photograph", False),
        ("may 2 cats play", False),
    ],
)
def test_boilerplate_is_a_date_and_nothing_to_see(caption, boilerplate):
    assert is_boilerplate(caption) == boilerplate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_aspect": 0.5}, "max_aspect is 0.5, but must be at least 1, or None"),
        ({"min_caption_words": -1}, "min_caption_words is -1, but must be at least 0"),
    ],
)
def test_impossible_filters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)
