"""The convolution that the feature networks are made of, with its batch norm folded in.

Letters: B batch, H and W sides, C channels in, D channels out, S side of the kernel.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from dalle_jax.weights.torch_file import WeightsError

Params = PyTree  # the name of a layer: its kernel and bias


def folded(state: Mapping[str, np.ndarray], conv: str, norm: str) -> dict[str, np.ndarray]:
    """Makes one convolution with bias of a convolution without and the batch norm after it.

    Args:
      state: a PyTorch state dict.
      conv: name of the convolution in it.
      norm: name of the batch norm; its epsilon is 1e-3, as in all networks here.
    Returns:
      "kernel" [S, S, C, D] and "bias" [D].
    Raises:
      WeightsError: if a tensor is missing.
    """
    try:
        weight = state[f"{conv}.weight"].astype(np.float64)  # D C S S
        scale, shift, mean, variance = (
            state[f"{norm}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
    except KeyError as error:
        raise WeightsError(
            f"the weights lack {error}; they are those of another network"
        ) from error
    scale = scale / np.sqrt(variance + 1e-3)
    return {
        "kernel": (weight * scale[:, None, None, None]).transpose(2, 3, 1, 0).astype(np.float32),
        "bias": (shift - mean * scale).astype(np.float32),
    }


def conv(
    layer: Mapping[str, Array | np.ndarray],
    x: Float[Array, "B H W C"],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "B H2 W2 D"]:
    """Convolves and adds the bias; padding as TensorFlow names it."""
    y = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # a ruler should not depend on the machine
    )
    return y + layer["bias"][None, None, None]


def depthwise(
    layer: Mapping[str, Array | np.ndarray], x: Float[Array, "B H W C"], *, stride: int
) -> Float[Array, "B H2 W2 C"]:
    """Convolves each channel by itself, kernel [S, S, 1, C], "SAME" padding, and adds the bias.

    As a sum of shifted images: XLA's own convolution of this kind takes ten times as long on a
    CPU (EfficientNet-Lite0 at 224 px: 34 against 341 ms an image on two shared cores).
    """
    S, (H, W) = len(layer["kernel"]), x.shape[1:3]
    sides = [-(-n // stride) for n in (H, W)]
    spans = [(n - 1) * stride + 1 for n in sides]
    room = [max(span - 1 + S - n, 0) for span, n in zip(spans, (H, W), strict=True)]
    x = jnp.pad(x, ((0, 0), *((r // 2, r - r // 2) for r in room), (0, 0)))
    y = layer["bias"][None, None, None]
    for i in range(S):
        for j in range(S):
            shifted = x[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
            y += shifted * layer["kernel"][i, j, 0][None, None, None]
    return y


def max_pool(x: Float[Array, "B H W C"], *, stride: int, padding: str) -> Array:
    """The greatest of each 3x3 pixels."""
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
