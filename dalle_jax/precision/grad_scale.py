"""One gradient scale for each resblock: training with float16 activations without underflow.

The norm of a gradient falls from block to block by more than the 5 exponent bits of float16 can
hold, so no one factor on the loss serves all blocks. Each resblock (an attention or MLP branch and
its sum with the residual stream) therefore has a scale s of its own. The stream x stays float32 in
both directions; only the branch sees float16, and only there is the gradient s times too large:

    y = leave(branch(enter(x, s)), s)    branch: layer norm, cast to float16, f, cast to float32
    x = x + y

Gradients of the branch's parameters come out multiplied by s; `unscale` divides them and says which
blocks are finite, and `update` moves the scales. An update of the parameters is skipped as a whole
unless all blocks are finite. bfloat16 has the exponent of float32 and needs none of this.

Letters: L layers, D width.

Source: Ramesh et al. 2021, section 2.4, figure 4 and appendix D.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, PyTree

from dalle_jax.errors import UserError


@jax.custom_vjp
def enter(x: Float32[Array, "*shape"], scale: Float32[Array, ""]) -> Float32[Array, "*shape"]:
    """Returns x as it is; the gradient that comes back from the branch is divided by the scale.

    Entries of that gradient that are not finite become 0, so that a branch that overflowed adds
    nothing to the gradient of the blocks before it and does not pull their scales down.

    Args:
      x: the residual stream, before the layer norm of the branch.
      scale: s of this resblock, > 0; it gets a zero gradient.
    Returns:
      x.
    Source: Ramesh et al. 2021, figure 4.
    """
    del scale
    return x


def _enter_backward(scale, dx):
    return _filtered(dx / scale), jnp.zeros_like(scale)


enter.defvjp(lambda x, scale: (enter(x, scale), scale), _enter_backward)


@jax.custom_vjp
def leave(y: Float32[Array, "*shape"], scale: Float32[Array, ""]) -> Float32[Array, "*shape"]:
    """Returns y as it is; the gradient that enters the branch is multiplied by the scale.

    Entries of the product that are not finite become 0.

    Args:
      y: what the branch adds to the residual stream, back in float32.
      scale: s of this resblock, the same as for `enter`; it gets a zero gradient.
    Returns:
      y.
    Source: Ramesh et al. 2021, figure 4.
    """
    del scale
    return y


def _leave_backward(scale, dy):
    return _filtered(dy * scale), jnp.zeros_like(scale)


leave.defvjp(lambda y, scale: (leave(y, scale), scale), _leave_backward)


def _filtered(gradient):
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How gradient scales start and move; the defaults are the paper's.

    `init_scale`, `min_scale` and `max_scale` are multiplied by the number of data-parallel
    replicas: the loss is divided by the size of the global batch, so gradients shrink as replicas
      are added.
    """

    init_scale: float = 2.0**13
    """Scale before the first update."""
    growth_factor: float = 2 ** (1 / 1000)
    """Factor after an update in which the gradients of the resblock were finite; at least 1."""
    backoff_factor: float = 2**-0.5
    """Factor after an update in which they were not; in (0, 1)."""
    backoff_interval: int = 125
    """Updates after a backoff in which the same scale is not divided again."""
    min_scale: float = 2.0**7
    """Smallest scale."""
    max_scale: float = 2.0**24
    """Largest scale."""

    def __post_init__(self):
        if not 0 < self.min_scale <= self.init_scale <= self.max_scale < math.inf:
            raise UserError(
                f"min_scale, init_scale and max_scale are {self.min_scale}, {self.init_scale} and "
                f"{self.max_scale}, but must be positive, finite and in rising order"
            )
        if not 1 <= self.growth_factor < math.inf:
            raise UserError(
                f"growth_factor is {self.growth_factor}, but must be at least 1 and finite"
            )
        if not 0 < self.backoff_factor < 1:
            raise UserError(
                f"backoff_factor is {self.backoff_factor}, but must lie between 0 and 1"
            )
        if self.backoff_interval < 0:
            raise UserError(f"backoff_interval is {self.backoff_interval}, but must be at least 0")


@struct.dataclass
class ScaleState:
    """The scales of all resblocks, and when each was last divided.

    Every field is a tree, since JAX also makes states of shapes or of shardings.
    """

    scale: PyTree
    """f32 [*shape], one s for each resblock."""
    since: PyTree
    """int32 [*shape], updates since this s was last divided; starts at the interval."""


def create(config: ScaleConfig, shape: tuple[int, ...], *, replicas: int) -> ScaleState:
    """Makes the scales before the first update; each may be divided at once.

    Args:
      config: the start, and the interval that `since` starts at.
      shape: one scale for each resblock, such as (L,) for one kind of them.
      replicas: data-parallel replicas M, at least 1.
    Returns:
      A state with every scale at M * start.
    Raises:
      ValueError: if replicas is below 1.
    Source: Ramesh et al. 2021, appendix D.
    """
    _check_replicas(replicas)
    return ScaleState(
        scale=jnp.full(shape, replicas * config.init_scale, jnp.float32),
        since=jnp.full(shape, config.backoff_interval, jnp.int32),
    )


def unscale(grads: PyTree, scales: Float32[Array, " L"]) -> tuple[PyTree, Bool[Array, " L"]]:
    """Divides the parameter gradients of one kind of resblock by their scales.

    Args:
      grads: gradients of all parameters inside the resblocks of this kind, such as those of
        attention_norm, qkv and attention_out; every leaf is [L, ...].
      scales: s of each layer's resblock, as it was in the backward pass.
    Returns:
      The gradients in float32, and for each layer whether all its entries were finite before the
      division; entries that were not are left as they are.
    Raises:
      ValueError: if the first axis of a leaf does not have size L.
    Source: Ramesh et al. 2021, appendix E, step 2.
    """
    (L,) = scales.shape
    for path, leaf in jax.tree.leaves_with_path(grads):
        if leaf.shape[:1] != (L,):
            raise ValueError(
                f"the gradient of {jax.tree_util.keystr(path)} has shape {leaf.shape}, but there "
                f"are {L} scales; its first axis must be the {L} stacked layers"
            )

    def divided(leaf):
        return leaf.astype(jnp.float32) / scales.reshape(L, *[1] * (leaf.ndim - 1))

    def is_finite(leaf):
        return jnp.isfinite(leaf).reshape(L, -1).all(axis=1)

    finite = jnp.stack([is_finite(leaf) for leaf in jax.tree.leaves(grads)]).all(axis=0)
    return jax.tree.map(divided, grads), finite


def update(
    state: ScaleState, finite: Bool[Array, "*shape"], *, config: ScaleConfig, replicas: int
) -> ScaleState:
    """Moves every scale after a backward pass, whether or not the parameters were updated.

    A finite resblock's scale grows. Any other is divided, unless it was already within the last
    `backoff_interval` updates: an update at t that divides is followed by none before t +
    backoff_interval + 1.

    Args:
      state: the scales that the backward pass used.
      finite: whether all parameter gradients of each resblock were finite, on all replicas.
      config: factors, interval and bounds.
      replicas: data-parallel replicas M, at least 1.
    Returns:
      The scales for the next update, in [M * min_scale, M * max_scale].
    Raises:
      ValueError: if replicas is below 1, or there is not one flag for each scale.
    Source: Ramesh et al. 2021, appendix D.
    """
    _check_replicas(replicas)
    if finite.shape != state.scale.shape:
        raise ValueError(
            f"got flags of shape {finite.shape}, but scales have shape {state.scale.shape}; "
            "give one flag for each resblock"
        )
    divides = ~finite & (state.since >= config.backoff_interval)
    factor = jnp.where(finite, config.growth_factor, jnp.where(divides, config.backoff_factor, 1.0))
    scale = jnp.clip(state.scale * factor, replicas * config.min_scale, replicas * config.max_scale)
    return ScaleState(scale=scale, since=jnp.where(divides, 0, state.since + 1))


def _check_replicas(replicas):
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}, but must be at least 1")
