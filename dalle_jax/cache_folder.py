"""Where this package keeps what it can make again: compiled programs, sampled emoji."""

import os
from pathlib import Path

from dalle_jax.errors import UserError


def cache_folder() -> Path | None:
    """The folder that $DALLE_JAX_CACHE names, else dalle_jax in the user's cache folder.

    That one is $XDG_CACHE_HOME, else ~/.cache.

    Returns:
      The folder, which may not be there yet; None if DALLE_JAX_CACHE is empty: keep nothing.
    Raises:
      UserError: if no folder is named and the user has no home.
    """
    named = os.environ.get("DALLE_JAX_CACHE")
    if named is not None:
        return Path(named).expanduser() if named else None
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if users.is_absolute():  # others are to be ignored, by the specification of XDG
        return users / "dalle_jax"
    try:
        return Path.home() / ".cache" / "dalle_jax"
    except RuntimeError as error:
        raise UserError(
            f"there is no folder for a cache ({error}); name one in DALLE_JAX_CACHE"
        ) from error
