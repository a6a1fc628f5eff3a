"""Convolution and max-pool of the networks for images, with gradients that are quick on a CPU.

XLA's convolution gives the result and the gradient of the input: on one core of an AMD EPYC (Zen 3,
float32, sizes of the emoji dVAE) it reaches 50 to 80 of a matrix product's 88 GFLOP/s. Its gradient
of the kernel, where C and D differ, does not: 26 to 63. There matrix products reach 40 to 72.

Letters: B batch, H and W sides of the image, C channels in, D channels out, S side of the kernel.
"""

import itertools
import math
from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key, PyTree


class Conv(nn.Module):
    """A convolution; its weights come from `init_kernels`."""

    features: int
    size: int
    halve: bool = False
    """Whether to take steps of two pixels, for a size of 3 and images of even sides."""
    bias: bool = True
    """Whether one number is added to each channel that comes out."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        """Convolves with zero "same" padding, where it halves at the right and bottom alone."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros_init(), shape)
        y = self._convolved(x, kernel)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros_init(), (self.features,))[
                None, None, None
            ]
        return y

    def _convolved(self, x, kernel):
        if self.size == 1:  # one matrix product: on a CPU its kernel gradient takes a quarter
            y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
            return y.reshape(*x.shape[:-1], self.features)
        if self.halve:
            dimensions = ("NHWC", "HWIO", "NHWC")
            zeros = ((0, 1), (0, 1))  # "SAME" would be the same here, were it written down
            return jax.lax.conv_general_dilated(
                x, kernel, (2, 2), zeros, dimension_numbers=dimensions
            )
        return convolve(x, kernel)


def init_kernels(shapes: PyTree, key: Key[Array, ""]) -> PyTree:
    """Initialises kernels from N(0, 1 / (C_in * size**2)); gains are 1 and biases 0.

    One draw serves all kernels, since XLA takes about a second to compile each draw of its own.

    Args:
      shapes: of nested parameters, named "kernel", "scale" or otherwise.
      key: for the one draw.
    Returns:
      The parameters in float32.
    """
    flat = flatten_dict(shapes)
    kernels = {path: leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"}
    ends = list(itertools.accumulate(math.prod(shape) for shape in kernels.values()))
    noise = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    params = {  # the dtype is named, since training would compile its step again for a weak one
        path: jnp.full(leaf.shape, path[-1] == "scale", jnp.float32) for path, leaf in flat.items()
    }
    for (path, shape), part in zip(kernels.items(), noise, strict=True):
        params[path] = math.prod(shape[:-1]) ** -0.5 * part.reshape(shape)
    return unflatten_dict(params)


def kernel_axes(params: PyTree, *, ends: Collection[str]) -> PyTree:
    """Says which parameters are matrices of inner layers, for optimizers such as Muon.

    Args:
      params: nested parameters.
      ends: names of the layers next to pixels and codes, which are left out.
    Returns:
      A tree that has, in place of each kernel [S, S, C, D] of another layer, the axes that it sums
      over and that of its output, so that it is a matrix [S * S * C, D]; else None.
    """

    def axes(path, _):
        names = [part.key for part in path]
        inner = names[-1] == "kernel" and names[-2] not in ends
        return ((0, 1, 2), (3,)) if inner else None

    return jax.tree_util.tree_map_with_path(axes, params)


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Doubles both sides: every pixel is copied four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


@jax.custom_vjp
def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "S S C D"]
) -> Float[Array, "B H W D"]:
    """Convolves with zero "same" padding; the side of the kernel is odd."""
    return _xla(x, kernel)


def _xla(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


def _forward(x, kernel):
    return convolve(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _xla(x, kernel), x)(dy)

    def of_xla(x, dy):
        return jax.linear_transpose(lambda kernel: _xla(x, kernel), kernel)(dy)[0]

    def of_products(x, dy):
        return kernel_gradient(x, dy, side=len(kernel))

    return dx, jax.lax.platform_dependent(x, dy, cpu=of_products, default=of_xla)


convolve.defvjp(_forward, _backward)


def kernel_gradient(
    x: Float[Array, "B H W C"], dy: Float[Array, "B H W D"], *, side: int
) -> Float[Array, "S S C D"]:
    """The gradient of the kernel of `convolve`, as one matrix product for each of its rows.

    Element (i, j) pairs each output with the input i rows and j columns away, so one of the two
    has to be shifted: the one with fewer channels, since every shift is a copy. The shifts by
    columns stand beside each other as more channels, which makes the products wide enough.

    Args:
      x: input of the convolution.
      dy: gradient of its output.
      side: S, odd.
    """
    if x.shape[-1] > dy.shape[-1]:  # the same sum, seen from the input: all shifts turn round
        return kernel_gradient(dy, x, side=side)[::-1, ::-1].swapaxes(2, 3)
    _, H, W, C = x.shape
    reach = side // 2
    x = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + W] for j in range(side)], axis=-1)
    dy = dy.reshape(-1, dy.shape[-1])
    rows = [x[:, i : i + H].reshape(len(dy), -1).T @ dy for i in range(side)]
    return jnp.stack(rows).reshape(side, side, C, dy.shape[-1])


@jax.custom_vjp
def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """The greatest of each 2x2 pixels; the gradient goes to it, or to one of equals.

    JAX's own gradient looks for inputs equal to the output and divides by how many there are. A
    compiler that works x out twice, rounding differently, finds none: 0 / 0. It is slower as well.
    """
    return _squares(x).max(axis=(2, 4))


def _squares(x):
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C)


def _pool_backward(x, dy):
    squares = _squares(x)
    top, bottom = squares[:, :, 0], squares[:, :, 1]  # B H/2 W/2 2 C
    left, right = jnp.moveaxis(jnp.maximum(top, bottom), 3, 0)  # B H/2 W/2 C
    first = jnp.array([True, False])
    wins = (left >= right)[:, :, None, :, None] == first[None, None, None, None, :, None]
    wins &= (top >= bottom)[:, :, None] == first[None, None, :, None, None, None]
    return (jnp.where(wins, dy[:, :, None, :, None], 0).reshape(x.shape),)


max_pool.defvjp(lambda x: (max_pool(x), x), _pool_backward)
