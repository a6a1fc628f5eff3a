"""The gradient scales of a prior's resblocks, as the update sees them.

Source: Ramesh et al. 2021, section 2.4 and appendix D.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from dalle_jax.models.prior_config import BRANCHES
from dalle_jax.precision import grad_scale
from dalle_jax.precision.grad_scale import ScaleConfig, ScaleState


class ResblockScaling:
    """One scale for each of the two branches of each layer: [L, 2].

    Args:
      depth: layers L.
      examples: images of one backward pass, over all devices. The loss is their mean, so that
        gradients shrink as they grow; the paper has one a device and counts devices.
    """

    def __init__(self, depth: int, *, examples: int):
        self._depth, self._examples = depth, examples
        self._config = ScaleConfig()

    def create(self) -> ScaleState:
        """The scales before the first update."""
        return grad_scale.create(self._config, (self._depth, 2), replicas=self._examples)

    def unscale(self, grads: PyTree, state: ScaleState) -> tuple[PyTree, Bool[Array, "L 2"]]:
        """Divides the gradients of the layers; says which resblocks are finite."""
        layers, finite = {}, []
        for i, names in enumerate(BRANCHES):
            branch = {name: grads["layers"][name] for name in names}
            branch, is_finite = grad_scale.unscale(branch, state.scale[:, i])
            layers |= branch
            finite.append(is_finite)
        return grads | {"layers": layers}, jnp.stack(finite, axis=1)

    def update(self, state: ScaleState, finite: Bool[Array, "L 2"]) -> ScaleState:
        """The scales for the next update."""
        return grad_scale.update(state, finite, config=self._config, replicas=self._examples)
