"""DALL-E and coarse-to-fine token generation in JAX/Flax."""

__all__ = ["Clip", "Model", "keep_programs", "load"]


def load(name_or_folder):
    """Opens a shipped model by name, or a model folder by path; see `Model.load`."""
    from dalle_jax.generate.model import Model  # jax takes a second: only who draws waits for it

    return Model.load(name_or_folder)


def __getattr__(name):
    if name == "Model":
        from dalle_jax.generate.model import Model

        return Model
    if name == "Clip":
        from dalle_jax.generate.clip import Clip

        return Clip
    if name == "keep_programs":
        from dalle_jax.compiled import keep_programs

        return keep_programs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
