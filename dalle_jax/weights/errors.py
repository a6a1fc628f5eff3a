"""The error of this room."""

from dalle_jax.errors import UserError


class WeightsError(UserError):
    """A file of weights that cannot be used, said in one sentence."""
