import logging
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest
import tiny

from dalle_jax import cli, compilation_cache
from dalle_jax.cache_folder import cache_folder
from dalle_jax.commands import process
from dalle_jax.data import emoji
from dalle_jax.data.sources import SourceError

DRAW = """
import sys, zlib
import dalle_jax
dalle_jax.enable_compilation_cache()
model = dalle_jax.load(sys.argv[1])
import jax
missed = []
jax.monitoring.register_event_listener(
    lambda event, **_: missed.append(event) if event.endswith("cache_misses") else None
)
images = model.generate(["red apple", "blue heart"], n=3)
print(len(missed), zlib.crc32(images.tobytes()))
"""


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Samples in a process of its own; gives how many programs it compiled, and a sum of images."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model().save(folder)

    def draw(cache, *, hash_seed=0):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", DRAW, str(folder)],
            env=os.environ
            | {"DALLE_JAX_CACHE": str(cache), "JAX_ENABLE_COMPILATION_CACHE": "true"}
            | {"PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return [int(word) for word in done.stdout.split()]

    return draw


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings as a user's process has them, put back afterwards."""
    names = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(compilation_cache, "_mention_compiling", lambda: None)
    for name, value in names.items():
        jax.config.update(name, value)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


LOAD = """
import os, sys, warnings
import jax
import dalle_jax
from dalle_jax import Clip, Model

def host():
    return dict(os.environ), list(warnings.filters), dict(jax.config.values)

before = host()
model = dalle_jax.load(sys.argv[1])
model.generate("red apple")
assert host() == before
settings = {"dalle_jax.compilation_cache", "dalle_jax.malloc", "dalle_jax.terminal"}
assert not settings & set(sys.modules)
"""


def test_a_library_call_changes_nothing_in_its_process(tmp_path):
    tiny.model().save(tmp_path / "tiny")
    cache = {"DALLE_JAX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tiny")]
    done = subprocess.run(
        command, env=os.environ | cache, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "cache").exists()


def test_a_command_keeps_programs_and_memory(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(process, "enable_compilation_cache", lambda: called.append("programs"))
    monkeypatch.setattr(process, "reuse_freed_memory", lambda: called.append("memory"))
    with pytest.raises(SystemExit):
        cli.main(["generate", "red apple", "--model", "none"])
    assert sorted(called) == ["memory", "programs"]


def keep():
    compilation_cache.enable_compilation_cache.__wrapped__()  # once a test, not once a process


@pytest.mark.slow
def test_a_second_process_compiles_nothing_but_what_is_damaged(draw, tmp_path):
    missed, images = draw(tmp_path)
    programs = sorted(tmp_path.rglob("*-cache"), key=lambda path: path.stat().st_size)
    assert missed == len(programs) > 2
    # Another order of sets and hashes must not make another program.
    assert draw(tmp_path, hash_seed=1) == [0, images]
    cut, empty = programs[:2]
    os.truncate(cut, 100)
    os.utime(cut, (0, 0))  # passes for one that has been looked at
    os.truncate(empty, 0)
    assert draw(tmp_path) == [2, images]
    assert empty.stat().st_size


def test_without_a_folder_to_write_to_the_cache_stays_off(settings, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "dalle_jax"):
        keep()
    assert settings.jax_compilation_cache_dir is None
    assert "compiled programs cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("given", "below"),
    [
        ({"DALLE_JAX_CACHE": "mine", "XDG_CACHE_HOME": "theirs"}, "mine"),
        ({"XDG_CACHE_HOME": "theirs"}, "theirs/dalle_jax"),
        ({"XDG_CACHE_HOME": ""}, ".cache/dalle_jax"),
        ({}, ".cache/dalle_jax"),
    ],
)
def test_programs_and_emoji_lie_below_the_cache_folder_of_the_user(
    settings, tmp_path, monkeypatch, given, below
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DALLE_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in given.items():
        monkeypatch.setenv(name, folder and str(tmp_path / folder))
    keep()
    assert settings.jax_compilation_cache_dir.startswith(str(tmp_path / below / "compiled"))
    assert settings.jax_persistent_cache_min_compile_time_secs == 0
    assert emoji_folder(monkeypatch).is_relative_to(tmp_path / below / "tfds")


def emoji_folder(monkeypatch):
    """Where the emoji would be sampled."""

    def stop(builder):
        raise InterruptedError(str(builder.data_path))

    monkeypatch.setattr(emoji, "_prepare", stop)
    with pytest.raises(InterruptedError) as stopped:
        emoji.emoji_source("train")
    return Path(str(stopped.value))


def test_an_empty_name_stands_for_nothing_to_be_kept(settings, monkeypatch):
    monkeypatch.setenv("DALLE_JAX_CACHE", "")
    keep()
    assert settings.jax_compilation_cache_dir is None
    with pytest.raises(SourceError, match="DALLE_JAX_CACHE is empty"):
        emoji.emoji_source("train")


def test_a_relative_cache_home_is_ignored_as_its_specification_asks(monkeypatch):
    monkeypatch.delenv("DALLE_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "dalle_jax"


def test_settings_that_the_user_gave_to_jax_stay(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "unused"))
    jax.config.update("jax_compilation_cache_dir", "theirs")
    keep()
    assert settings.jax_compilation_cache_dir == "theirs"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    keep()
    assert settings.jax_compilation_cache_dir is None
    assert not (tmp_path / "unused").exists()


def test_the_longest_unused_programs_go_when_they_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LIMIT", 250)
    now = time.time()
    for i in range(5):
        path = tmp_path / f"program{i}-cache"
        path.write_bytes(b"\xfd" * 100)
        os.utime(path, (now - (i + 2) % 5, now - i))
    compilation_cache._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == [
        "program3-cache",
        "program4-cache",
    ]


def test_only_new_programs_are_looked_through(tmp_path, monkeypatch):
    whole = tmp_path / "a-cache"
    whole.write_bytes(zlib.compress(b"program"))
    compilation_cache._tidy(tmp_path)
    seen = []
    monkeypatch.setattr(compilation_cache, "_is_whole", lambda path: seen.append(path.name))
    os.utime(whole, (0, 0))
    (tmp_path / "b-cache").write_bytes(b"x")
    compilation_cache._tidy(tmp_path)
    assert seen == ["b-cache"]
    assert list(tmp_path.glob("*-cache")) == [whole]


def test_long_compiling_is_mentioned_once(monkeypatch, caplog):
    timers = []

    class Timer:
        def __init__(self, seconds, say):
            self.say, self.cancelled = say, False
            timers.append(self)

        def start(self):
            pass

        def cancel(self):
            self.cancelled = True

    heard = []
    monkeypatch.setattr(compilation_cache.threading, "Timer", Timer)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", heard.append)
    compilation_cache._mention_compiling()
    [listen] = heard
    listen(compilation_cache._LOWERED, 0.1, fun_name="small")
    listen(compilation_cache._COMPILED, 0.1, fun_name="small")
    listen(compilation_cache._LOWERED, 0.1, fun_name="large")
    assert [timer.cancelled for timer in timers] == [True, False]
    with caplog.at_level(logging.INFO, "dalle_jax"):
        timers[1].say()
    listen(compilation_cache._COMPILED, 9.0, fun_name="large")
    listen(compilation_cache._LOWERED, 0.1, fun_name="another")
    assert len(timers) == 2
    assert [record.message for record in caplog.records] == ["compiling"]


def test_jax_still_tells_when_it_compiles():
    heard = []

    def listen(event, seconds, **_):
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    compiling = compilation_cache._LOWERED, compilation_cache._COMPILED
    events = [event for event in heard if event in compiling]
    assert events[-2:] == list(compiling)
