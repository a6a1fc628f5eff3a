import errno
import itertools
import json
import logging
import os
import threading
import tracemalloc

import numpy as np
import pytest

from dalle_jax.data import batches as batches_lib
from dalle_jax.data import image_reader
from dalle_jax.data.batches import batches, one_epoch
from dalle_jax.data.sources import FolderSource, SourceError
from dalle_jax.image.pixels import decode, encode_png
from dalle_jax.text.bpe import Tokenizer


class Images:
    """Flat images whose brightness is their number; some are broken."""

    def __init__(self, count, side=8, broken=()):
        self.count, self.side, self.broken = count, side, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        shade = np.full((self.side, self.side, 3), index, np.uint8)
        data = b"broken" if index in self.broken else encode_png(shade)
        captions = [f"number {index}", f"image {index}"]
        return {"id": f"n{index}", "image": data, "captions": captions}


class Codes:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        codes = np.full((4, 4), 60_000 + index, np.uint16)
        errors = np.full((4, 4), -index, np.float16)
        return {"id": str(index), "codes": codes, "errors": errors, "captions": ["a"]}


def take(source, count, **options):
    chosen = {"batch_size": 4, "seed": 0, "px": 8, "crop": "prior", "threads": 0} | options
    return list(itertools.islice(batches(source, **chosen), count))


def shades(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def equal(first, second):
    return all(
        a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def words():
    captions = [caption for i in range(10) for caption in Images(10)[i]["captions"]]
    return Tokenizer.train(captions, vocabulary=300)


@pytest.fixture
def text(words):
    return {"tokenizer": words, "text_length": 17, "bpe_dropout": 0.5, "caption_dropout": 0.3}


def test_an_epoch_shows_each_record_once_and_the_next_in_another_order():
    seen = [s for batch in take(Images(12), 6) for s in shades(batch)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert seen[:12] != list(range(12))


def test_the_order_is_that_of_earlier_versions(words):
    """A run that was begun before must go on with the batches it would have had."""
    drawn = take(Images(12), 4, seed=1, tokenizer=words, text_length=17, caption_dropout=0.3)
    order = [[10, 5, 7, 3], [8, 4, 9, 2], [0, 11, 6, 1], [11, 8, 9, 3]]
    assert [shades(batch) for batch in drawn] == order
    assert [words.decode(row) for row in drawn[0]["text"]] == ["", "", "", "image 3"]


def test_the_seed_decides_the_order():
    first, again, other = (take(Images(12), 3, seed=s) for s in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("count", [12, 13])
def test_a_global_batch_is_the_same_for_one_two_and_four_processes(count, text):
    def together(processes):
        parts = [
            take(
                Images(count, side=12),
                9,
                process_index=i,
                process_count=processes,
                crop="dvae",
                **text,
            )
            for i in range(processes)
        ]
        for step in zip(*parts, strict=True):
            yield sorted(
                (image.tobytes(), tokens.tobytes())
                for part in step
                for image, tokens in zip(part["image"], part["text"], strict=True)
            )

    alone = list(together(1))
    assert list(together(2)) == alone
    assert list(together(4)) == alone


@pytest.mark.parametrize("threads", [0, 3])
def test_a_resumed_iterator_continues_exactly(threads, text):
    def fresh():
        return batches(
            Images(10, side=12),
            batch_size=4,
            seed=3,
            px=8,
            crop="dvae",
            threads=threads,
            **text,
        )

    unbroken = list(itertools.islice(fresh(), 7))
    iterator = fresh()
    for _ in range(4):
        next(iterator)
    saved = json.dumps(iterator.get_state())
    resumed = fresh()
    resumed.set_state(json.loads(saved))
    assert equal(list(itertools.islice(resumed, 3)), unbroken[4:])


def test_another_seed_goes_on_from_the_same_place_with_other_batches(text):
    """What a run does that is to go round a batch that breaks it."""
    first, second = (
        batches(Images(10), batch_size=4, seed=seed, px=8, crop="prior", threads=0)
        for seed in (3, 4)
    )
    for _ in range(4):
        next(first)
    second.set_state(first.get_state())
    assert second.get_state() == first.get_state()
    assert shades(next(second)) != shades(next(first))


def test_threads_do_not_change_what_is_drawn(text):
    with_threads = take(Images(10, side=12), 6, crop="dvae", threads=4, **text)
    assert equal(with_threads, take(Images(10, side=12), 6, crop="dvae", **text))


def test_a_source_smaller_than_the_batch_fills_it_again_and_again():
    assert sorted(shades(take(Images(3), 1, batch_size=6)[0])) == [0, 0, 1, 1, 2, 2]


def test_a_batch_may_hold_one_example():
    assert sorted(shades(batch)[0] for batch in take(Images(3), 3, batch_size=1)) == [0, 1, 2]


def test_both_captions_are_used_and_some_are_left_out(words):
    drawn = take(Images(10), 20, tokenizer=words, text_length=17, caption_dropout=0.25)
    texts = [words.decode(row) for batch in drawn for row in batch["text"]]
    assert 8 <= texts.count("") <= 32  # 80 draws at 0.25
    assert any(text.startswith("number") for text in texts)
    assert any(text.startswith("image") for text in texts)


def test_captions_stay_with_their_images(words):
    for batch in take(Images(10), 5, tokenizer=words, text_length=17, bpe_dropout=0.5):
        for shade, row in zip(shades(batch), batch["text"], strict=True):
            assert words.decode(row).split()[1] == str(shade)


def test_a_broken_image_is_replaced_by_the_next_and_named_once(caplog):
    with caplog.at_level(logging.WARNING, "dalle_jax.data"):
        drawn = take(Images(6, broken={2, 5}), 6, batch_size=6)
    for batch in drawn:
        assert sorted(shades(batch)) == [0, 0, 1, 3, 3, 4]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert "image n2 is left out" in messages[0]
    assert "image n5 is left out" in messages[1]
    assert sum("(2 so far): image of 6 bytes: not an image" in m for m in messages) == 1


def test_an_image_that_vanished_does_not_stop_training(tmp_path, caplog):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(Images(1)[0]["image"])
        (tmp_path / f"{name}.txt").write_text(name)
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    assert take(source, 1)[0]["image"].shape == (4, 8, 8, 3)
    assert "image a.png is left out" in caplog.text


class Odd(Images):
    """One record fails as no image does, or takes its time."""

    def __init__(self, count, at, happens):
        super().__init__(count)
        self.at, self.happens = at, happens

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record | self.happens() if index == self.at else record


def fail():
    raise RuntimeError("no such column")


class Endless:
    """Records without number, made when they are asked for."""

    def __init__(self, count, broken=()):
        self.count, self.broken, self.asked = count, broken, 0
        self.image = encode_png(np.zeros((8, 8, 3), np.uint8))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked += 1
        return {"id": f"n{index}", "image": self.image, "captions": ["a"]}


def test_an_example_costs_the_same_of_a_million_records_as_of_ten():
    """Neither indices of all records nor an order of them are made, and one record is read."""
    source = Endless(10**6)
    iterator = batches(source, batch_size=4, seed=0, px=8, crop="prior", threads=0)
    next(iterator)
    tracemalloc.start()
    try:
        for _ in range(5):
            next(iterator)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**5  # bytes; a tuple of the indices has 8,000,000
    assert source.asked == 6 * 4


class Failing(Images):
    """The disk fails at one record, so many times."""

    def __init__(self, code, times):
        super().__init__(4)
        self.code, self.times = code, times

    def __getitem__(self, index):
        if index == 2 and self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code))
        return super().__getitem__(index)


def test_a_disk_that_fails_for_a_moment_changes_no_batch(monkeypatch, caplog):
    monkeypatch.setattr(image_reader, "_RETRY_S", (0, 0, 0))
    assert equal(take(Failing(errno.EIO, 3), 3), take(Images(4), 3))
    assert caplog.text.count("record 2 cannot be read ([Errno 5] Input/output error); trying") == 3
    assert "left out" not in caplog.text


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_goes_on_failing_stops_the_run_by_name(monkeypatch, code):
    monkeypatch.setattr(image_reader, "_RETRY_S", (0, 0, 0))
    with pytest.raises(SourceError, match=r"record 2 could not be read, tried 4 times .*Errno"):
        take(Failing(code, -1), 2)
    with pytest.raises(SourceError, match="record 2 could not be read"):
        list(one_epoch(Failing(code, -1), batch_size=4, px=8))


class Clock:
    """Time that passes when something is said to take it."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(
    ("reading", "training", "said"),
    [
        (0.9, 0.1, ["27 of the last 30 s went into waiting for data, 900 ms a batch"]),
        (0.7, 0.3, []),
        (0.0, 0.1, []),
    ],
)
def test_a_run_that_waits_for_its_images_most_of_the_time_is_warned(
    monkeypatch, caplog, reading, training, said
):
    clock = Clock()
    monkeypatch.setattr(batches_lib, "time", clock)

    class Slow(Endless):
        def __getitem__(self, index):
            clock.now += reading
            return super().__getitem__(index)

    iterator = batches(Slow(40), batch_size=1, seed=0, px=8, crop="prior", threads=0)
    for _ in range(100):
        next(iterator)
        clock.now += training
    assert [m.split(": ")[1].split(";")[0] for m in caplog.messages] == said


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (fail, r"record 2 cannot .* \(RuntimeError: no such column\); mend it or take it out"),
        (lambda: {"captions": []}, r"n2 cannot be made into an example \(IndexError: list index"),
    ],
)
def test_what_fails_in_a_thread_is_raised_with_the_name_of_its_record(
    happens, message, threads, text
):
    with pytest.raises(SourceError, match=message):
        take(Odd(4, 2, happens), 2, threads=threads, **text)
    if threads == 0:
        with pytest.raises(SourceError, match="2 cannot be made"):
            list(one_epoch(Odd(4, 2, fail), batch_size=4, px=8))


def test_waiting_for_data_is_said_with_what_is_read(monkeypatch, caplog):
    monkeypatch.setattr(batches_lib, "_SLOW_S", 0.05)
    said = threading.Event()

    def listen(record):
        if record.getMessage().endswith("; being read now: record 2"):
            said.set()
        return True

    def hang():
        assert said.wait(60)
        return {}

    caplog.handler.addFilter(listen)
    with caplog.at_level(logging.INFO, "dalle_jax.data"):
        take(Odd(4, 2, hang), 1, threads=1)
    assert caplog.messages[0].startswith("waiting for data for 0 s; being read now: ")
    assert caplog.messages[-1].startswith("the data came after ")


def test_only_broken_images_are_an_error():
    with pytest.raises(SourceError, match="none of the 3 images can be used; `dalle-jax data"):
        take(Images(3, broken={0, 1, 2}), 1)
    with pytest.raises(SourceError, match="none of the 3 images can be used"):
        list(one_epoch(Images(3, broken={0, 1, 2}), batch_size=2, px=8))


def test_images_below_a_quarter_of_the_side_are_left_out(caplog):
    with pytest.raises(SourceError, match="none of the 2 images"):
        take(Images(2, side=7), 1, px=32)
    assert "7x7 pixels, but the short side must have at least 8" in caplog.text
    assert take(Images(2, side=8), 1, px=32)[0]["image"].shape == (4, 32, 32, 3)


def test_codes_come_instead_of_images(words):
    batch = take(Codes(), 1, batch_size=3, tokenizer=words, text_length=5)[0]
    assert sorted(batch) == ["codes", "errors", "text"]
    assert batch["errors"].dtype == np.float32
    assert batch["codes"].dtype == np.int32
    assert sorted(batch["codes"][:, 0, 0]) == [60_000, 60_001, 60_002]


def test_once_gives_every_record_in_order_with_its_primary_caption(words):
    source = Images(5, side=10, broken={1, 4})
    first, last = one_epoch(source, batch_size=2, px=8, tokenizer=words, text_length=17)
    assert shades(first) == first["index"].tolist() == [0, 2]
    assert shades(last) == last["index"].tolist() == [3]
    assert [words.decode(row) for row in first["text"]] == ["number 0", "number 2"]


def test_an_exact_image_passes_through_unchanged():
    source = Images(2)
    batch = next(one_epoch(source, batch_size=2, px=8))
    np.testing.assert_array_equal(batch["image"][1], decode(source[1]["image"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 3}, "a batch of 4 cannot be shared by 3 processes"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bpe_dropout": 1.5}, r"bpe_dropout must lie in \[0, 1\], got 1.5"),
        ({"caption_dropout": -0.1}, r"caption_dropout must lie in \[0, 1\], got -0.1"),
        ({"crop": "left"}, "no crop 'left'; choose from dvae, prior, center"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SourceError, match=message):
        take(Images(4), 1, **options)


def test_text_needs_a_length(words):
    with pytest.raises(SourceError, match="text_length must be at least 2 .*, got None"):
        take(Images(4), 1, tokenizer=words)


def test_an_empty_source_is_refused():
    with pytest.raises(SourceError, match="the data source is empty"):
        take(Images(0), 1)
