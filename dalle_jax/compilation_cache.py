"""Compiled programs, kept between processes in JAX's persistent cache.

They lie in `compiled` below `cache_folder`; without that folder the cache is off. Settings of JAX
that name another folder, or turn the cache off, stay. The cache saves time and nothing else:
whatever is wrong with it, work goes on.
"""

import contextlib
import functools
import logging
import os
import platform
import threading
import warnings
import zlib
from pathlib import Path

from dalle_jax.cache_folder import cache_folder
from dalle_jax.errors import UserError

_log = logging.getLogger("dalle_jax")

LIMIT = 2**28  # bytes; the shipped model's programs for one number of images take 0.3 MB
SILENCE = 1.0  # seconds that a program may take to compile, or to read, before it is mentioned

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # compiling follows
_COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.cache
def enable_compilation_cache() -> None:
    """Turns the cache on for this process, and a log line once something takes long to compile.

    To be called before the first program is compiled; best before jax is imported. It changes the
    process: settings of JAX, a filter of warnings, and how much XLA logs. Programs call it;
    a library calls it only if it is asked to.
    """
    # Of tuning hints in Intel programs XLA's loader says that the machine lacks them: a paragraph
    # of errors for each program read. Programs of other machines are in other folders.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    _mention_compiling()
    settings = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    try:
        folder = cache_folder()
        if folder is None:
            return
        folder = folder / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
    except (OSError, UserError) as error:
        _log.info("compiled programs cannot be kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX warns of each entry that it cannot read or write, and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _machine() -> str:
    """Names the kind of processor: programs for another may use instructions that it lacks."""
    kind = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:  # Linux
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        kind += f"-{zlib.crc32(flags.encode()):08x}"
    return kind


def _tidy(folder: Path) -> None:
    """Removes programs cut short, which JAX never writes again, and the longest unused if too many.

    Only those written since the last time are read. JAX has a limit of its own, but it needs the
    package filelock, and any file lost on the way stops all writing.
    """
    stamp = folder / "tidied"
    last = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    room = LIMIT
    programs = [(path, path.stat()) for path in folder.glob("*-cache")]
    for path, stat in sorted(programs, key=lambda program: program[1].st_atime, reverse=True):
        room -= stat.st_size
        if room < 0 or (stat.st_mtime >= last and not _is_whole(path)):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    program = path.read_bytes()
    if program[:1] != b"x":  # not zlib's: JAX has found the package zstandard
        return bool(program)
    try:
        zlib.decompress(program)
    except zlib.error:
        return False
    return True


def _mention_compiling() -> None:
    import jax

    waiting: list[threading.Timer] = []
    mentioned = threading.Event()

    def mention():
        mentioned.set()
        folder = jax.config.jax_compilation_cache_dir
        _log.info("compiling%s", f", for this time and the next: {folder}" if folder else "")

    def heard(event: str, _: float, **details) -> None:
        if event == _LOWERED and not mentioned.is_set():
            timer = threading.Timer(SILENCE, mention)
            timer.daemon = True
            timer.start()
            waiting.append(timer)
        elif event == _COMPILED and waiting:
            waiting.pop().cancel()

    jax.monitoring.register_event_duration_secs_listener(heard)
