"""How a process that computes with JAX begins."""

from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.malloc import reuse_freed_memory


def prepare_process() -> None:
    """Turns on the cache of compiled programs and keeps freed memory; call it before jax."""
    reuse_freed_memory()
    enable_compilation_cache()
