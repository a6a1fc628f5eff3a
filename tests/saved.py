"""Weights of a saved step, read by Orbax alone."""

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp


def ema_params(checkpoints):
    """The EMA of the newest step in a folder, as numpy arrays."""
    path = max(checkpoints.glob("[0-9]*")).absolute()
    saved = ocp.checkpointables_metadata(path).metadata["ema_params"]
    arrays = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), saved)
    return ocp.load_checkpointables(path, {"ema_params": arrays})["ema_params"]
