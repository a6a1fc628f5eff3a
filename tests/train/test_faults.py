"""What goes wrong around a run: its disk and its data. docs/operations.md is the table of these."""

import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dalle_jax.data.sources import SourceError
from dalle_jax.train import manifest
from dalle_jax.train import state as state_lib
from dalle_jax.train.checkpoint import CheckpointError, Checkpoints
from dalle_jax.train.log import MetricsLog
from dalle_jax.train.loop import LoopConfig, train
from dalle_jax.train.metrics_buffer import NonFiniteError
from dalle_jax.train.stage import Stage

CONFIG = LoopConfig(steps=12, log_every=1, save_every=2, evaluate_every=1, sheet_every=1)


class Line(Stage):
    """Fits a slope; `at` is called with every number of updates done."""

    name = "line"
    rules = (("*", PartitionSpec()),)
    optimizer = optax.with_extra_args_support(optax.adam(0.1))

    def __init__(self, at=lambda step: None):
        self.at, self.step = at, 0

    def init(self, key):
        return {"slope": jax.random.normal(key, (1,))}

    def loss(self, params, batch, key, step):
        return jnp.mean((batch["x"] * params["slope"] - batch["y"]) ** 2), {}

    def evaluate(self, params):
        self.step += 1
        self.at(self.step)
        return {"slope": float(params["slope"][0])}

    def sheet(self, params):
        return np.zeros((8, 8, 3), np.uint8)


class Data:
    """Batches without end; `wrong` maps the number of one to what stands in it, or is raised."""

    def __init__(self, wrong=None):
        self.wrong, self.position = wrong or {}, 0

    def __next__(self):
        self.position += 1
        x = np.full(2, 1 / self.position, np.float32)
        wrong = self.wrong.get(self.position)
        if isinstance(wrong, Exception):
            raise wrong
        return {"x": x, "y": x if wrong is None else np.full(2, wrong, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def run(workdir, *, at=lambda step: None, wrong=None, **changes):
    """Trains to the end; `at` counts the updates of this run alone."""
    config = dataclasses.replace(CONFIG, **changes)
    state = train(Line(at), Data(wrong), config=config, workdir=workdir, settings={})
    return state.replace(key=jax.random.key_data(state.key))


STATE = state_lib.init_state(Line(), jax.random.key(0))


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved(workdir):
    return Checkpoints(workdir / "checkpoints").steps()


def wait_until(condition):
    """For tests that change the disk at an update: the save before it is over."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_one_failed_save_is_said_and_the_next_goes_on(tmp_path, monkeypatch, caplog):
    def at(step):
        if step == 5:
            wait_until(lambda: saved(tmp_path) == [2, 4])
            monkeypatch.setattr(manifest, "write", no_room)
        if step == 7:
            wait_until(lambda: caplog.messages)
            monkeypatch.undo()

    with caplog.at_level(logging.WARNING):
        run(tmp_path, at=at, max_to_keep=2)
    (message,) = caplog.messages
    assert message == (
        f"step 6 could not be saved in {tmp_path / 'checkpoints'}: No space left on device; step 4 "
        "is safe; the next save tries again, and 2 more in vain end the run"
    )
    assert saved(tmp_path) == [10, 12]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000010", "000012"]


def test_the_third_failed_save_in_a_row_ends_the_run_at_once(tmp_path, monkeypatch, caplog):
    updates = []

    def at(step):
        updates.append(step)
        if step == 5:
            wait_until(lambda: saved(tmp_path) == [2, 4])
            monkeypatch.setattr(manifest, "write", no_room)
        if step == 10:
            wait_until(lambda: "step 8 could not be saved" in caplog.text)
            time.sleep(0.5)  # the third may fail too before the next update looks

    sentence = "step 10 could not be saved in .*: No space left on device; step 4 is safe; mend"
    with pytest.raises(CheckpointError, match=sentence):
        run(tmp_path, at=at, steps=30)
    assert updates[-1] == 10  # looked at after every update, not at the next save
    assert saved(tmp_path) == [2, 4]


def test_a_failed_last_save_is_an_error_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", no_room)
    sentence = "step 2 could not be saved in .*: No space left on device; no step is safe; mend"
    with pytest.raises(CheckpointError, match=sentence), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, STATE, {}, {})


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", no_room)
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, STATE, {}, {})
        assert checkpoints.newest() is None
        raise KeyError


def test_a_save_that_cannot_begin_fails_as_one_that_cannot_end(tmp_path, caplog):
    """A folder where a small file is tried first is in the way as a read-only disk is."""
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        (tmp_path / ".trial-0").mkdir()
        checkpoints.save(2, STATE, {}, {})
        assert "step 2 could not be saved" in caplog.text
        (tmp_path / ".trial-0").rmdir()
        checkpoints.save(4, STATE, {}, {})
    assert checkpoints.steps() == [4]


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_an_unwritable_workdir_is_refused_before_anything_is_compiled(tmp_path, name, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    workdir = tmp_path / "run" / "file" if name == "" else tmp_path / "run"
    if name:
        (workdir / name).touch()
    monkeypatch.setattr(jax, "jit", pytest.fail)
    with pytest.raises(CheckpointError, match="nothing can be saved in .*: (Not a dir|File exis)"):
        run(workdir)


def test_too_little_room_for_the_steps_to_keep_is_said_at_the_start(tmp_path, caplog):
    huge = {"w": jax.ShapeDtypeStruct((2**40,), jnp.float32)}  # 4.4 TB
    with caplog.at_level(logging.WARNING):
        Checkpoints(tmp_path, max_to_keep=2).prepare(huge)
    (message,) = caplog.messages
    assert message.startswith("checkpoints of 4398046.5 MB may not fit on the disk of ")
    assert "2 are kept, one more while saving, and " in message


def test_metrics_lines_that_found_no_room_are_written_with_the_next(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, stage="line", step=0)
    log.write(1, {"loss": 1.0})

    def full(*_):  # takes half a line, and no more
        with open(path, "a") as file:
            file.write('{"step": 2, "lo')
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "dalle_jax"):
        patch.setattr(Path, "open", full)
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": 3.0})
        patch.undo()
        log.write(4, {"loss": 4.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert [message.removeprefix(str(path)) for message in caplog.messages] == [
        " cannot be written (No space left on device); its lines wait",
        " is written again, nothing is missing",
    ]


# In a mount namespace of its own, where anybody may mount a small disk.
REAL_DISK = """
import json, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_faults import CheckpointError, run, saved, wait_until
from dalle_jax.terminal import show_log_lines

disk, filling = Path({disk!r}), Path({disk!r}) / "other"

def at(step):
    if step == 5:
        wait_until(lambda: saved(disk) == [2, 4])
        try:
            with filling.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        except OSError:
            pass
    if step == 7:
        time.sleep(0.5)  # the save of 6 fails
        filling.unlink()
    if step == 9:
        wait_until(lambda: saved(disk) == [2, 4, 8])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

show_log_lines()
ends = []
for at_updates in (at, print):
    try:
        run(disk, at=at_updates, steps=100)
    except CheckpointError as error:
        ends.append(str(error))
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
run(disk, steps=10)
print("\\n" + json.dumps([ends, saved(disk), (disk / "metrics.jsonl").read_text()]))
"""


def test_a_real_disk_may_become_full_and_then_read_only(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m disk "$0" && exec "$@"']
    try:
        subprocess.run([*mounted, disk, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here")
    code = REAL_DISK.format(tests=str(Path(__file__).parent), disk=str(disk))
    done = subprocess.run(
        [*mounted, disk, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (while_running, at_start), at_last, metrics = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr.count("could not be saved") == 3
    assert "step 6 could not be saved" in done.stderr
    assert "No space left on device; step 4 is safe; the next save tries again" in done.stderr
    assert "line-000006.png could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 14 could not be saved" in while_running
    assert "Read-only file system; step 8 is safe; mend that and start" in while_running
    assert "nothing can be saved in" in at_start and "Read-only file system; make" in at_start
    assert at_last == [4, 8, 10]
    losses = [json.loads(line) for line in metrics.splitlines()]
    assert [entry["step"] for entry in losses if "loss" in entry] == list(range(1, 11))


def test_a_broken_value_in_the_data_is_never_saved_and_a_restart_goes_on_before_it(tmp_path):
    sentence = r"loss \(and grad_norm, .*\) became nan at step 5; the last good checkpoint is st"
    with pytest.raises(NonFiniteError, match=sentence):
        run(tmp_path, wrong={5: np.nan})
    assert saved(tmp_path) == [2, 4]
    chex.assert_trees_all_equal(run(tmp_path), run(tmp_path / "unbroken"))


def test_a_failing_data_source_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(SourceError, match="a.png cannot be made"):
        run(tmp_path, wrong={8: SourceError("a.png cannot be made into an example")})
    assert saved(tmp_path) == [2, 4, 6]
