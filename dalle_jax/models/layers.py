"""One layer of attention and MLP, its parameters and its norms, for priors and CLIP.

Letters: B batch, T positions, D width, N heads, H head size, F mlp, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from dalle_jax.precision import float16
from dalle_jax.precision.grad_scale import enter, leave

NORM_EPSILON = 1e-6  # a prior's activations start near 0.125 / sqrt(D); squared 4e-6 at D = 3968

SANDWICH = ("attention_out_norm", "mlp_out_norm")
"""Norms of what the branches add, in layers that have them (Ding et al. 2021)."""

Weights = PyTree  # dicts of arrays, by the names of `init_layers`


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU as x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def layer(
    weights: Weights,
    x: Float[Array, "..."],
    attend: Callable[[Array], tuple[Array, Any]],
    *,
    dtype: DTypeLike,
    linear: Callable[[Weights, Array], Array] | None = None,
    axis: int = -1,
    scale: Float[Array, "2"] | None = None,
    grad_dtype: DTypeLike = jnp.float32,
    epsilon: float = NORM_EPSILON,
    gelu: Callable[[Array], Array] = quick_gelu,
) -> tuple[Float[Array, "..."], Any]:
    """Adds one attention and one MLP branch to the residual stream; each starts with a norm.

    Args:
      weights: of this layer, as one entry of what `init_layers` stacks; with the norms of
        `SANDWICH`, each branch also ends with one.
      x: residual stream [B, T, D], in float32.
      attend: maps queries, keys and values [B, T, 3, N, H] to what attention gives [B, T, N, H],
        and anything else, which is passed on.
      dtype: of matrix products and of what `attend` gets.
      linear: maps weights and an input to an output; None for `project`.
      axis: of x, along which D lies.
      scale: gradient scales of the two branches, see `precision.grad_scale`; None for none.
      grad_dtype: type in which gradients of kernels are summed, if dtype is of half precision.
      epsilon: added to the variance in the norms.
      gelu: of the MLP.

    Returns:
      The stream after the layer, and what `attend` passed on.

    Source: Ramesh et al. 2021, appendix B.
    """
    linear = linear or partial(project, grad_dtype=grad_dtype)

    def entering(i, x):
        return x if scale is None else enter(x, scale[i])

    def leaving(i, y):
        return y if scale is None else leave(y.astype(jnp.float32), scale[i])

    def norm(name, x):
        return layer_norm(weights[name], x, axis=axis, epsilon=epsilon).astype(dtype)

    def adding(i, y):
        if SANDWICH[i] in weights:
            y = layer_norm(weights[SANDWICH[i]], y.astype(jnp.float32), axis=axis, epsilon=epsilon)
        return leaving(i, y)

    attended, passed_on = attend(linear(weights["qkv"], norm("attention_norm", entering(0, x))))
    x = x + adding(0, linear(weights["attention_out"], attended))
    y = gelu(linear(weights["mlp_in"], norm("mlp_norm", entering(1, x))))
    return x + adding(1, linear(weights["mlp_out"], y)), passed_on


def layer_norm(
    weights: Weights, x: Float[Array, "..."], *, axis: int = -1, epsilon: float = NORM_EPSILON
) -> Float[Array, "..."]:
    """Mean 0 and variance 1 along an axis, then gain and bias.

    `nn.LayerNorm` computes the variance as E[x^2] - E[x]^2, which is less exact, and takes no
    weights from a stack.
    """
    x = x - x.mean(axis=axis, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=axis, keepdims=True) + epsilon)
    others = [i for i in range(x.ndim) if i != axis % x.ndim]
    scale, bias = (jnp.expand_dims(weights[name], others) for name in ("scale", "bias"))
    return x * scale + bias


def init_layers(
    key: Key[Array, ""],
    *,
    depth: int,
    width: int,
    heads: int,
    mlp: int,
    stds: dict[str, float],
) -> Weights:
    """Initialises the parameters of all layers, stacked on a first axis of size L; biases are zero.

    Args:
      key: for the weights.
      depth: layers L.
      width: D, a multiple of heads.
      heads: N.
      mlp: F.
      stds: standard deviations of the kernels of "qkv", "attention_out", "mlp_in" and "mlp_out".
    """
    L, D, N, H = depth, width, heads, width // heads
    sizes = {  # kernel, bias
        "qkv": ((D, 3, N, H), (3, N, H)),
        "attention_out": ((N, H, D), (D,)),
        "mlp_in": ((D, mlp), (mlp,)),
        "mlp_out": ((mlp, D), (D,)),
    }
    layers = {"attention_norm": init_norm((L, D)), "mlp_norm": init_norm((L, D))}
    for key_kernel, (name, (kernel, bias)) in zip(
        jax.random.split(key, len(sizes)), sizes.items(), strict=True
    ):
        layers[name] = {
            "kernel": normal(key_kernel, (L, *kernel), stds[name]),
            "bias": jnp.zeros((L, *bias)),
        }
    return layers


MATRICES = {  # axes of a kernel that are summed over, and those of what comes out
    "qkv": ((1,), (3, 4)),  # L D 3 N H: queries, keys and values are matrices of their own
    "attention_out": ((1, 2), (3,)),  # L N H D
    "mlp_in": ((1,), (2,)),  # L D F
    "mlp_out": ((1,), (2,)),  # L F D
}


def matrices(params: PyTree) -> PyTree:
    """Says which parameters of a model are matrices of its layers, for optimizers such as Muon.

    Args:
      params: of a model that has the stacks of `init_layers` below the name "layers".
    Returns:
      A tree that has, in place of each kernel of a stack, its axes as in `MATRICES`; the others
      count matrices. In place of everything else, such as embeddings and heads, None.
    """

    def axes(path, _):
        names = [part.key for part in path]
        if names[-1] == "kernel" and "layers" in names:
            return MATRICES[names[-2]]
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def init_norm(shape: tuple[int, ...]) -> Weights:
    """A layer norm that does nothing more than norm."""
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Samples float32 numbers from N(0, std^2)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def layer_weights(layers: Weights, i: int) -> Weights:
    """The weights of layer i of the stack."""
    return jax.tree.map(lambda weights: weights[i], layers)


def split_qkv(qkv: Float[Array, "B T parts N H"]) -> list[Float[Array, "B T N H"]]:
    """Queries, keys and values, or those of them that are there."""
    return [qkv[:, :, i] for i in range(qkv.shape[2])]


def project(
    weights: Weights, x: Float[Array, "B T ..."], *, grad_dtype: DTypeLike = jnp.float32
) -> Float[Array, "B T ..."]:
    """Maps all axes of x after B and T to those of the bias."""
    B, T, *_ = x.shape
    kernel, bias = weights["kernel"], weights["bias"]
    # one plain matrix product: XLA copies a kernel that is contracted along two axes
    x, kernel = x.reshape(B, T, -1), kernel.reshape(-1, bias.size)
    half = x.dtype != jnp.float32
    y = float16.product(x, kernel, grad_dtype) if half else x @ kernel.astype(x.dtype)
    y = y + bias.reshape(1, 1, -1)  # in float32, so that its gradient is summed there
    return y.astype(x.dtype).reshape(B, T, *bias.shape)
