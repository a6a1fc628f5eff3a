"""Checks of what the options of a command name, made before any work begins."""

from pathlib import Path

from dalle_jax.errors import UserError

SEEDS = 2**32


def check_input(option: str, path: Path | None) -> None:
    """Raises a UserError if there is a path, but no file that can be read."""
    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{option} is {path}, which cannot be read: {error.strerror}") from error


def check_seed(seed: int) -> None:
    """Raises a UserError for a seed that JAX or numpy would not take."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed is {seed}; it must be a whole number from 0 to {SEEDS - 1}")
