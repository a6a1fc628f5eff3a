"""Processes that train together, on loopback; each has half of the 8 devices of one alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest
import remesh

from dalle_jax.parallel import processes
from dalle_jax.parallel.processes import ProcessConfig
from dalle_jax.train.checkpoint import Checkpoints

TESTS = Path(__file__).parents[1]
STEPS = 12


def start(folder, *, count, script="member.py", steps=STEPS, options=()):
    """Starts all processes of a run; `options` as in member.py, which says them all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, str(TESTS / script), str(folder), str(port)]
    devices = {"JAX_NUM_CPU_DEVICES": str(8 // count)}
    running = []
    for index in range(count):
        with (folder / f"log-{index}-of-{count}").open("a") as log:
            command = [*common, *map(str, (index, count, steps, *options))]
            running.append(
                subprocess.Popen(command, env=os.environ | devices, stdout=log, stderr=log)
            )
    return running


def finish(folder, running):
    codes = [process.wait(timeout=120) for process in running]
    logs = [path.read_text()[-3000:] for path in sorted(folder.glob("log-*"))]
    return codes, "\n".join(logs)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, log = finish(folder, start(folder, count=1))
    assert codes == [0], log
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone, tmp_path):
    codes, log = finish(tmp_path, start(tmp_path, count=2))
    assert codes == [0, 0], log
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))  # written once each
    assert [p.name for p in sorted((tmp_path / "sheets").iterdir())] == [
        f"member-{step:06d}.png" for step in (4, 8, 12)
    ]


@pytest.mark.slow
def test_after_sigkill_of_one_in_an_update_or_a_save_restarts_go_on_as_if_unbroken(alone, tmp_path):
    running = start(tmp_path, count=2, options=(0.2,))
    checkpoint = tmp_path / "checkpoints" / "000004"
    while not checkpoint.exists() and running[1].poll() is None:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGKILL)
    end(running)
    assert STEPS not in losses(tmp_path)
    end(start(tmp_path, count=2, options=(0, STEPS)))
    codes, log = finish(tmp_path, start(tmp_path, count=2))
    assert codes == [0, 0], log
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


def end(running):
    """Waits for the one that is killed, and ends the other, as a scheduler would."""
    assert running[1].wait(timeout=60) == -signal.SIGKILL
    running[0].kill()  # the runtime ends it too, after a time
    running[0].wait()


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step_and_one_goes_on_alone(alone, tmp_path):
    running = start(tmp_path, count=2, options=(0.2,))
    while not (tmp_path / "metrics.jsonl").exists() and running[0].poll() is None:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    codes, log = finish(tmp_path, running)
    assert codes == [128 + signal.SIGTERM] * 2, log
    assert 0 < len(losses(tmp_path)) < STEPS
    codes, log = finish(tmp_path, start(tmp_path, count=1))
    assert codes == [0], log
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_the_same_on_another_mesh_in_more_processes_and_on_one_device(tmp_path):
    for count in (1, 2):
        codes, log = finish(tmp_path, start(tmp_path, count=count, script="remesh.py"))
        assert codes == [0] * count, log
    assert "step 2 could not be saved" in log and "process 1 cannot write there" in log
    assert "process 1 could not save its part" in log
    files = {path.name for path in (tmp_path / "checkpoints" / "000002").iterdir()}
    assert {"manifest.json", "manifest-00001.json"} < files
    assert not list((tmp_path / "checkpoints").glob("failed-*"))
    wanted = remesh.created().replace(step=np.int32(2))
    _, state, _, _ = Checkpoints(tmp_path / "checkpoints").restore(remesh.created())
    chex.assert_trees_all_equal(remesh.readable(state), remesh.readable(wanted))


def test_a_process_needs_all_of_its_place_or_none():
    with pytest.raises(ValueError, match="num_processes 2 and process_id None; give all three"):
        ProcessConfig(coordinator_address="10.0.0.1:1234", num_processes=2)
    with pytest.raises(ValueError, match=r"process_id is 2, but must lie in 0\.\.1"):
        ProcessConfig(coordinator_address="10.0.0.1:1234", num_processes=2, process_id=2)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod, but none of an indexed job
    ],
)
def test_several_processes_are_found_by_what_their_launcher_says(monkeypatch, environment, several):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.is_distributed() == several
