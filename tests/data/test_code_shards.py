import json
import os
import re

import numpy as np
import pytest

from dalle_jax.data import code_shards
from dalle_jax.data.batches import batches
from dalle_jax.data.code_shards import CodeSource, write_codes
from dalle_jax.data.record import DamagedRecordError, SourceError

CODEC = "c" * 64


def records(count, grid=4):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 65_536, (count, grid, grid), dtype=np.int32)
    errors = rng.normal(0, 100, codes.shape).astype(np.float16)
    return [
        {"id": f"n{i}", "captions": [f"num\nber {i}", "é"], "codes": c, "errors": e}
        for i, (c, e) in enumerate(zip(codes, errors, strict=True))
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 3)
    write_codes(tmp_path / "codes", iter(records(7)), meta={"codec": CODEC, "px": 64})
    return tmp_path / "codes"


def test_records_come_back_as_they_were_over_several_shards(folder):
    source = CodeSource(folder, codec_fingerprint=CODEC)
    assert len(source) == 7
    for i, written in enumerate(records(7)):
        read = source[i]
        assert (read["id"], read["captions"]) == (written["id"], written["captions"])
        assert read["codes"].dtype == np.uint16
        np.testing.assert_array_equal(read["codes"], written["codes"])
        assert read["errors"].dtype == np.float16
        np.testing.assert_array_equal(read["errors"], written["errors"])
    assert source.meta == {"codec": CODEC, "px": 64}
    source.verify()


def test_only_whole_files_and_a_manifest_remain(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "codes-00000.array_record",
        "codes-00001.array_record",
        "codes-00002.array_record",
        "manifest.json",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["grid"] == 4
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3, 1]


def test_batches_read_shards_from_several_threads(folder):
    source = CodeSource(folder, codec_fingerprint=CODEC)
    batch = next(batches(source, batch_size=7, seed=0, px=8, crop="prior", threads=3))
    got = sorted(codes.tobytes() for codes in batch["codes"])
    assert got == sorted(record["codes"].tobytes() for record in records(7))


def test_codes_of_another_codec_are_refused(folder):
    with pytest.raises(SourceError, match="made by the codec cccccccccccc, not by eeee; delete"):
        CodeSource(folder, codec_fingerprint="eeee")


def test_an_interrupted_run_leaves_nothing_that_opens(tmp_path):
    def broken():
        yield from records(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_codes(tmp_path, broken(), meta={"codec": CODEC})
    with pytest.raises(SourceError, match="no finished code shards"):
        CodeSource(tmp_path, codec_fingerprint=CODEC)


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path):
    (tmp_path / ".codes-00000.array_record.partial").symlink_to("/dev/full")
    with pytest.raises(SourceError, match=r"00000.array_record could not be written: .*No space"):
        write_codes(tmp_path, records(2), meta={"codec": CODEC})
    assert list(tmp_path.iterdir()) == []


def test_a_shortened_shard_is_found_when_opening(folder):
    shard = folder / "codes-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"codes-00001\.array_record has \d+ bytes instead of"):
        CodeSource(folder, codec_fingerprint=CODEC)


def damage(shard, position):
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)


def test_a_damaged_record_is_left_out_of_training_and_found_by_verify(folder, caplog):
    damage(folder / "codes-00002.array_record", 90)  # inside its one record
    source = CodeSource(folder, codec_fingerprint=CODEC)
    with pytest.raises(DamagedRecordError, match="code record 6 is damaged"):
        source[6]
    batch = next(batches(source, batch_size=7, seed=0, px=8, crop="prior", threads=0))
    assert len({codes.tobytes() for codes in batch["codes"]}) == 6
    assert "record 6 is left out" in caplog.text
    with pytest.raises(SourceError, match=r"codes-00002\.array_record is damaged; copy it again"):
        source.verify()


def test_a_damaged_index_stops_the_run_at_the_first_record_of_its_shard(folder):
    shard = folder / "codes-00001.array_record"
    damage(shard, shard.stat().st_size // 2)
    source = CodeSource(folder, codec_fingerprint=CODEC)
    with pytest.raises(SourceError, match=r"codes-00001\.array_record is damaged \(.*\); copy it"):
        source[4]
    with pytest.raises(SourceError, match=r"codes-00001\.array_record is damaged"):
        next(batches(source, batch_size=7, seed=0, px=8, crop="prior", threads=0))


def descriptors(folder):
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.readlink(link).startswith(str(folder)) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("threads", [0, 3])
def test_more_shards_than_may_be_open_are_read_in_any_order(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(code_shards, "SHARD_RECORDS", 1)
    monkeypatch.setattr(code_shards, "OPEN_SHARDS", 3)
    write_codes(tmp_path, records(12), meta={"codec": CODEC})
    source = CodeSource(tmp_path, codec_fingerprint=CODEC)
    reading = batches(source, batch_size=12, seed=0, px=8, crop="prior", threads=threads)
    got = [sorted(codes.tobytes() for codes in next(reading)["codes"]) for _ in range(3)]
    assert got == 3 * [sorted(record["codes"].tobytes() for record in records(12))]
    if threads == 0:
        assert descriptors(tmp_path) == 3


@pytest.mark.parametrize("failed", ["open() failed: Too many open files", "pread() failed: Stale"])
def test_a_failing_disk_is_not_taken_for_a_damaged_record(folder, monkeypatch, failed):
    def fail(*_):
        raise RuntimeError(f"{failed}; reading x")

    source = CodeSource(folder, codec_fingerprint=CODEC)
    monkeypatch.setattr(code_shards, "ArrayRecordReader", fail)
    with pytest.raises(OSError, match=re.escape(failed)):
        source[0]


def test_shards_of_another_format_are_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(SourceError, match="format 9, but this version reads format 2"):
        CodeSource(folder, codec_fingerprint=CODEC)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((4, 4), 65_536), "bad: codes reach from 65536 to 65536, but shards hold 0"),
        (np.full((4, 4), -1), "bad: codes reach from -1 to -1"),
        (np.zeros((4, 5), int), r"bad: codes of shape \(4, 5\), expected one square grid"),
    ],
)
def test_codes_that_do_not_fit_are_named(tmp_path, codes, message):
    bad = [{"id": "bad", "captions": ["a"], "codes": codes, "errors": np.zeros((4, 4))}]
    with pytest.raises(SourceError, match=message):
        write_codes(tmp_path, bad, meta={"codec": CODEC})


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="no records to write"):
        write_codes(tmp_path, [], meta={"codec": CODEC})


def test_shards_must_name_their_codec(tmp_path):
    with pytest.raises(SourceError, match=r'need meta\["codec"\]'):
        write_codes(tmp_path, records(1), meta={})
