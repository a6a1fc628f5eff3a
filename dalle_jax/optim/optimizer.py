"""AdamW as the paper has it: clipped second moment, gradient clipping, halving on plateau.

Source: Ramesh et al. 2021, appendices A.2 and B.2.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax import tree_utils

from dalle_jax.optim.muon import Muon
from dalle_jax.precision.formats import decode, encode, has_16_bits, largest

MEAN, VARIANCE = "1-6-9", "0-6-10"  # formats of Adam's moments in 16 bits


def scale_by_clipped_adam(
    b1: float, b2: float, eps: float, max_second_moment: float
) -> optax.GradientTransformation:
    """Adam whose second-moment estimate is clipped by value before anything uses it.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      max_second_moment: greatest value an entry of the second moment may take; 5 in the paper.
    Returns:
      A transformation with optax's own Adam state.
    Source: Ramesh et al. 2021, appendix B.2.
    """

    def init(params):
        zeros = tree_utils.tree_zeros_like
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        mu = tree_utils.tree_update_moment(updates, state.mu, b1, 1)
        nu = tree_utils.tree_update_moment_per_elem_norm(updates, state.nu, b2, 2)
        nu = jax.tree.map(lambda v: jnp.minimum(v, max_second_moment), nu)
        count = optax.safe_increment(state.count)
        mean = tree_utils.tree_bias_correction(mu, b1, count)
        variance = tree_utils.tree_bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, variance)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def store_in_16_bits(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam that keeps the moments of the layers' kernels in 16 bits between updates.

    The mean is in 1-6-9, the variance in 0-6-10; numbers too large for them become their largest.
    Gains, biases, embeddings and heads keep float32 moments, as in the paper.

    Args:
      adam: a transformation with optax's Adam state.
    Source: Ramesh et al. 2021, appendix D.
    """

    def each(change, tree):
        def of_leaf(path, x):
            return change(x) if has_16_bits(path) else x

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def stored(state):
        def clamped(x, format):
            bound = largest(format)
            return encode(jnp.clip(x, -bound, bound), format)

        mean = each(lambda x: clamped(x, MEAN), state.mu)
        return state._replace(mu=mean, nu=each(lambda x: clamped(x, VARIANCE), state.nu))

    def init(params):
        return stored(adam.init(params))

    def update(updates, state, params=None):
        mean = each(lambda x: decode(x, MEAN), state.mu)
        variance = each(lambda x: decode(x, VARIANCE), state.nu)
        updates, state = adam.update(updates, state._replace(mu=mean, nu=variance), params)
        return updates, stored(state)

    return optax.GradientTransformation(init, update)


def decayed(params: PyTree) -> PyTree:
    """True for the weights that weight decay pulls on: every `kernel`, and nothing else (ours).

    Biases, gains and embeddings are left alone; the paper does not say what it left out.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    b1: float = 0.9,
    eps: float = 1e-8,
    grad_clip_norm: float | None = None,
    max_second_moment: float | None = None,
    plateau_steps: int | None = None,
    in_16_bits: bool = False,
    muon: Muon | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with the paper's additions, each left out when it is None.

    Args:
      learning_rate: learning rate for each update.
      b2: decay of the second moment; 0.999 for the dVAE, 0.96 for the prior.
      weight_decay: multiplied by the learning rate, as AdamW does (ours: the paper does not say).
      b1: decay of the first moment.
      eps: added to the root of the second moment.
      grad_clip_norm: global norm that gradients are scaled down to; 4 for the prior.
      max_second_moment: see `scale_by_clipped_adam`.
      plateau_steps: the learning rate is halved whenever the mean loss over this many updates has
        not fallen for four such spans, five times at most. The paper halved it by eye.
      in_16_bits: see `store_in_16_bits`.
      muon: moves matrices in Adam's place (ours); clipping, decay and plateaus stay as they are,
        and decay is still multiplied by `learning_rate`.
    Returns:
      A transformation whose update takes the loss as `value=`.
    Source: Ramesh et al. 2021, appendices A.2 and B.2.
    """
    if max_second_moment is None:
        adam = optax.scale_by_adam(b1, b2, eps)
    else:
        adam = scale_by_clipped_adam(b1, b2, eps, max_second_moment)
    if in_16_bits:
        adam = store_in_16_bits(adam)
    parts = [
        adam if muon is None else muon.direction(adam),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if grad_clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(grad_clip_norm))
    if plateau_steps is not None:
        parts.append(
            optax.contrib.reduce_on_plateau(
                factor=0.5, patience=4, accumulation_size=plateau_steps, min_scale=2**-5
            )
        )
    return optax.with_extra_args_support(optax.chain(*parts))
