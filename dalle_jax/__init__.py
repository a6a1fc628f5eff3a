"""DALL-E and coarse-to-fine token generation in JAX/Flax."""

import os
from typing import TYPE_CHECKING, Literal

from dalle_jax.generate.sampling import SamplingConfig

if TYPE_CHECKING:
    from dalle_jax.compilation_cache import enable_compilation_cache
    from dalle_jax.generate.clip_scorer import Clip
    from dalle_jax.generate.model import Model

__version__ = "0.2.0"
__all__ = ["Clip", "Model", "SamplingConfig", "enable_compilation_cache", "load"]


def load(
    name_or_folder: str | os.PathLike, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> "Model":
    """Opens a shipped model by name, or a model folder by path; see `Model.load`."""
    from dalle_jax.generate.model import Model  # jax takes a second to import

    return Model.load(name_or_folder, dtype=dtype)


def __getattr__(name):  # what needs jax is imported when it is first used
    if name == "Model":
        from dalle_jax.generate.model import Model

        return Model
    if name == "Clip":
        from dalle_jax.generate.clip_scorer import Clip

        return Clip
    if name == "enable_compilation_cache":
        from dalle_jax.compilation_cache import enable_compilation_cache

        return enable_compilation_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
