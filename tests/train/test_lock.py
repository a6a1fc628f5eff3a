"""Two runs never work in one folder, and what is left of a killed one is in nobody's way."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys

import pytest

from dalle_jax.train.checkpoint_folder import CheckpointError
from dalle_jax.train.lock import locked


def test_a_second_run_in_one_folder_is_refused_and_told_who_is_there(tmp_path):
    sentence = rf"another run works in .*run \(process {os.getpid()} on .+\); wait for its end"
    with locked(tmp_path / "run"):
        with pytest.raises(CheckpointError, match=sentence), locked(tmp_path / "run"):
            pytest.fail("two runs at once")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):  # free again
        pass


HOLDER = """
import sys, time
from pathlib import Path
from dalle_jax.train.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on "), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        pass


def test_a_disk_that_locks_only_what_may_be_written_is_locked(tmp_path, monkeypatch):
    modes = []

    def as_nfs(file, _):
        modes.append(file.mode)
        if file.mode == "r":
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with locked(tmp_path):
        assert modes == ["r", "r+"]


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert f"the disk of {tmp_path} has no locks (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    sentence = "nothing can be saved in .*: Not a directory; make it a folder"
    with pytest.raises(CheckpointError, match=sentence), locked(tmp_path / "file" / "run"):
        pass
