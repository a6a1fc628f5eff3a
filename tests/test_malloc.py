"""Freed memory, in processes of their own: nothing turns the setting back."""

import os
import platform
import subprocess
import sys

import pytest

LEFT = """
import ctypes
from dalle_jax.malloc import reuse_freed_memory

reuse_freed_memory()
malloc = ctypes.CDLL(None)
malloc.malloc.restype, malloc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
buffer = malloc.malloc(2**26)
ctypes.memset(buffer, 1, 2**26)
malloc.free(buffer)
with open("/proc/self/statm") as pages:
    print(int(pages.read().split()[1]) * 4096 // 2**20)
"""


def mebibytes_left(**environment):
    done = subprocess.run(
        [sys.executable, "-c", LEFT],
        env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_a_freed_buffer_stays_unless_the_environment_says_how_memory_works():
    assert mebibytes_left() > 64
    assert mebibytes_left(MALLOC_ARENA_MAX="8") < 64
