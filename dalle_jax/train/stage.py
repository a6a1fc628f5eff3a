"""What the training loop needs to know of a model; one class for each stage of training.

Source: ours.
"""

from abc import ABC, abstractmethod

import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from dalle_jax.parallel.sharding_rules import Rules
from dalle_jax.train.resblock_scaling import ResblockScaling

Batch = PyTree  # a dict of arrays, each with the batch B as first axis
Metrics = dict[str, Array]  # names to f32 scalars


class Stage(ABC):
    """A model in training: its parameters, loss, optimizer, evaluation and samples."""

    name: str
    """Short name, used in the log and in file names."""

    optimizer: optax.GradientTransformationExtraArgs
    """Its update receives the loss as `value=`."""

    rules: Rules = ()
    """How its parameters are sharded on a mesh; `train` needs them, a train step alone does not."""

    scaling: ResblockScaling | None = None
    """Gradient scales, for float16; None for none."""

    @abstractmethod
    def init(self, key: Key[Array, ""]) -> PyTree:
        """Initialises the parameters; pure and traced under jit."""

    @abstractmethod
    def loss(
        self, params: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""], **scales
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the mean loss over the batch; pure and traced under jit.

        Args:
          params: parameters being trained.
          batch: what the iterator yields, or one micro-batch of it.
          key: differs for every step and micro-batch.
          step: number of the step, from 0, for schedules.
          scales: `scales`, the gradient scales, if the stage has any.

        Returns:
          Loss in f32, and metrics, each a f32 scalar that is a mean over the batch too.
        """

    def init_from_data(self, params: PyTree) -> PyTree:
        """Changes the initial parameters of a new run; may look at data.

        Args:
          params: from `init`, sharded over the mesh.
        Returns:
          The same tree if nothing changes; else one whose new arrays have the same values in all
          processes, on the host or sharded as the old ones.
        """
        return params

    def evaluate(self, params: PyTree) -> dict[str, float]:
        """Measures EMA parameters on held-out data, on the host; may be slow."""
        del params
        return {}

    def sheet(self, params: PyTree) -> UInt8[np.ndarray, "H W 3"] | None:
        """Makes an image of samples from EMA parameters; None for none."""
        del params
        return None
