"""Products of float16 whose sums are float32, forward and backward.

A product of float16 arrays gives float16 in JAX, in the backward pass too. There the gradient of a
kernel sums over all tokens of a batch: times a gradient scale it passes the greatest float16,
65,504, long before what it is summed from does. Here it leaves as float32, as the kernel is kept.

Source: ours. In Ramesh et al. 2021 parameters and their gradients are float16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float16, Float32


@jax.custom_vjp
def product(x: Float16[Array, "B T m"], kernel: Float32[Array, "m n"]) -> Float32[Array, "B T n"]:
    """Multiplies by a kernel rounded to float16, with sums in float32.

    Args:
      x: one vector a token; its gradient is rounded to float16 after it is summed.
      kernel: its gradient is float32, the sum of products of float16 numbers.
    Returns:
      x @ kernel; its gradient is rounded to float16 before it is used.
    Source: ours.
    """
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    dy = dy.astype(x.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    dx = jnp.einsum("BTn,mn->BTm", dy, kernel.astype(x.dtype), **f32)
    dkernel = jnp.einsum("BTm,BTn->mn", x, dy, **f32)
    return dx.astype(x.dtype), dkernel


product.defvjp(_forward, _backward)
