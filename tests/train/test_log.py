import json
import logging
import struct

import pytest

from dalle_jax import terminal
from dalle_jax.terminal import show_log_lines
from dalle_jax.train.log import (
    MetricsLog,
    ProgressLog,
    clock,
    installed_sinks,
    read_metrics,
)


def test_metrics_are_one_object_a_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", stage="dvae", step=0)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": float("nan")})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 1, "stage": "dvae", "time_s": pytest.approx(0, abs=1), "loss": 2.5}
    assert second["loss"] is None


def test_reopened_log_drops_later_and_broken_lines_and_goes_on_in_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "time_s": 40.0}\n{"step": 9, "time_s": 90.0}\n{"step": 10, "ti')
    log = MetricsLog(path, stage="dvae", step=5)
    assert path.read_text() == '{"step": 5, "time_s": 40.0}\n'
    log.write(6, {})
    assert [e["step"] for e in read_metrics(path)] == [5, 6]
    assert 40 <= read_metrics(path)[1]["time_s"] < 50
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_plain_line_tells_loss_rate_and_time_left(capsys):
    with ProgressLog("dvae", step=0, steps=600) as progress:
        progress.report(100, {"loss": 1.23456, "steps_per_s": 2.0, "examples_per_s": 32.0})
    line = capsys.readouterr().err
    assert line.endswith(" dvae 100/600  loss 1.235  2 steps/s  32 examples/s  4:10 left\n")


def test_terminal_shows_a_bar_and_log_lines_beside_it(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "_force_terminal", True)
    show_log_lines()
    with ProgressLog("dvae", step=0, steps=600) as progress:
        progress.report(100, {"loss": 1.5})
        logging.getLogger("dalle_jax.train").info("a [bold] line of any length %s", "x" * 100)
    shown = capsys.readouterr().err
    assert "100/600" in shown and "loss 1.5" in shown
    assert f" a [bold] line of any length {'x' * 100}" in shown.replace("\n", "")


def test_clock_reads_as_minutes_or_hours():
    assert [clock(s) for s in (0.0, 59.6, 250.0, 3661.0)] == ["0:00", "1:00", "4:10", "1:01:01"]


class Sink:
    def __init__(self, fails_at=None):
        self.seen, self.fails_at = [], fails_at

    def write(self, step, metrics):
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.seen.append((step, metrics))


def test_sinks_get_the_same_metrics_and_one_that_fails_is_left_out(tmp_path, caplog):
    good, bad = Sink(), Sink(fails_at=2)
    log = MetricsLog(tmp_path / "metrics.jsonl", stage="dvae", step=0, sinks=[bad, good])
    with caplog.at_level("WARNING"):
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    assert good.seen == [(step, {"loss": float(step)}) for step in (1, 2, 3)]
    assert bad.seen == [(1, {"loss": 1.0})]
    assert caplog.messages == ["Sink takes no more metrics (No space left on device)"]
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_reads_the_metrics_and_forgets_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboardX")
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        sinks = installed_sinks(tmp_path, step=start)
        log = MetricsLog(tmp_path / "x", stage="dvae", step=start, sinks=sinks)
        for step in steps:
            log.write(step, {"loss": step / 2, "eval/loss": float(start)})
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)
    assert [scalars(path) for path in files] == [
        [("start", 1, 0.0)]
        + [x for s in (1, 2) for x in (("loss", s, s / 2), ("eval/loss", s, 0.0))],
        [("start", 2, 0.0)]
        + [x for s in (2, 3) for x in (("loss", s, s / 2), ("eval/loss", s, 1.0))],
    ]


def test_events_are_framed_as_tensorboardx_frames_them(tmp_path):
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    from dalle_jax.train.tensorboard import _record

    writer = record_writer.RecordWriter(str(tmp_path / "records"))
    writer.write(b"some bytes")
    writer.close()
    assert _record(b"some bytes") == (tmp_path / "records").read_bytes()


def scalars(path):
    """(tag, step, value) of each event in a file: length, its check, the event, its check."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        if event.HasField("session_log"):
            found.append(("start", event.step, 0.0))
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_without_the_package_there_is_no_other_place(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_sinks(tmp_path, step=0) == []
    assert list(tmp_path.iterdir()) == []
