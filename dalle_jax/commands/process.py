"""How a process that computes with JAX begins."""

from dalle_jax.compiled import keep_programs
from dalle_jax.memory import keep_memory


def prepare_process() -> None:
    """Turns on the cache of compiled programs and keeps freed memory; call it before jax."""
    keep_memory()
    keep_programs()
