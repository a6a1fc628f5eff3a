import json
import logging

import pytest

from dalle_jax import terminal
from dalle_jax.terminal import show_log_lines
from dalle_jax.train.log import MetricsLog, ProgressLog, clock, read_metrics


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
