"""Muon: momentum whose matrices are made orthogonal; AdamW moves everything that is no matrix.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import optax
from jaxtyping import Array, Float, PyTree


@dataclass(frozen=True, kw_only=True)
class MuonOptions:
    """Settings of a training run that can use Muon; its other settings are AdamW's."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices of the layers; AdamW moves everything else in either case."""
    muon_learning_rate: float = 0.01
    """Muon's learning rate where AdamW's is learning_rate; both rise and fall together."""

    def muon(
        self, learning_rate: float, matrices: Callable[[PyTree], PyTree], **options
    ) -> "Muon | None":
        """Gives what `adamw` wants to know, or None for AdamW alone.

        Args:
          learning_rate: greatest learning rate of AdamW.
          matrices: of the model, see `Muon`.
          **options: further fields of `Muon`.
        Raises:
          ValueError: for another optimizer, or a learning rate that is not positive and finite.
        """
        if self.optimizer == "adamw":
            return None
        if self.optimizer != "muon":
            raise ValueError(f"optimizer is {self.optimizer!r}, but has to be 'adamw' or 'muon'")
        if not 0 < self.muon_learning_rate < math.inf:
            raise ValueError(
                f"muon_learning_rate is {self.muon_learning_rate}, but has to be positive and "
                "finite"
            )
        return Muon(scale=self.muon_learning_rate / learning_rate, matrices=matrices, **options)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Which parameters Muon moves, and how far."""

    scale: float | Float[Array, ""]
    """Its learning rate in multiples of AdamW's."""
    matrices: Callable[[PyTree], PyTree]
    """Maps parameters to a tree that has, in place of each, None for AdamW, or its axes as a pair
    (inputs, outputs): those that a product sums over, and those of its result. All other axes
    count matrices, each of which is made orthogonal by itself. It goes by paths, as
    `jax.tree_util.tree_map_with_path` does, since of some trees only the matrices are there."""
    gather: Callable[[PyTree], PyTree] = lambda gradients: gradients
    """Puts gradients on the devices that make them orthogonal, each matrix whole on one."""
    scatter: Callable[[PyTree], PyTree] = lambda updates: updates
    """Puts what they become back to where the parameters lie."""

    def direction(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """Replaces Adam's direction, before decay and learning rate, for the matrices.

        A matrix [m, n] moves by `scale * sqrt(max(1, n / m))` times an orthogonal one: momentum
        0.95 with Nesterov's look ahead, five Newton-Schulz steps in float32.

        Args:
          adam: for all other parameters.
        """
        muon = optax.chain(
            optax.stateless(lambda gradients, _: self.gather(gradients)),
            optax.contrib.scale_by_muon(weight_dimension_numbers=self._numbers),
            optax.stateless(lambda updates, _: self.scatter(self._scaled(updates))),
        )
        return optax.partition({"adam": adam, "muon": muon}, self._labels)

    def _labels(self, params):
        found = self.matrices(params)
        return jax.tree.map(lambda _, axes: "adam" if axes is None else "muon", params, found)

    def _numbers(self, gradients):
        """Dimension numbers; gradients of what is no matrix are left out of the tree already."""
        numbers = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(lambda _, axes: numbers(*axes), gradients, self.matrices(gradients))

    def _scaled(self, updates):
        def scaled(update, axes):
            inputs, outputs = (math.prod(update.shape[i] for i in part) for part in axes)
            return self.scale * max(1.0, outputs / inputs) ** 0.5 * update

        return jax.tree.map(scaled, updates, self.matrices(updates))
