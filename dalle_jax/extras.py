"""Packages that only an extra of this package installs."""

import importlib.util

from dalle_jax.errors import UserError

PACKAGES = {
    "train": ("array_record", "grain", "optax", "orbax", "tensorflow_datasets"),
    "emoji": ("tensorflow_datasets",),
    "serve": ("prometheus_client", "starlette", "uvicorn"),
}
"""Modules that each extra brings and this package imports at the head of a file."""


def require(extra: str) -> None:
    """Raises a UserError that names the extra if one of its packages is missing."""
    missing = [name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"this needs the package {missing[0]}, which is not installed: "
            f"pip install 'dalle_jax[{extra}]'"
        )
