"""Products of float16 or bfloat16 whose sums are float32, forward and backward.

A product of float16 arrays gives float16 in JAX, in the backward pass too. There the gradient of a
kernel sums over all tokens of a batch: times a gradient scale it passes the greatest float16,
65,504, long before what it is summed from does. That of bfloat16 arrays has 8 bits, and so has its
sum over devices. Here it leaves in the type of the kernel, float32 or, as in the paper,
float16.

Source: ours; Ramesh et al. 2021, appendix D, for float16 kernels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float16, Float32


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float16[Array, "B T m"] | BFloat16[Array, "B T m"],
    kernel: Float[Array, "m n"],
    sums: DTypeLike = jnp.float32,
) -> Float32[Array, "B T n"]:
    """Multiplies by a kernel rounded to the type of x, with sums in float32.

    Args:
      x: one vector a token; its gradient is rounded to its type after it is summed.
      kernel: its gradient is the sum of products of numbers of that type, rounded to its own.
      sums: type of that sum, over the tokens of a device and over devices.
    Returns:
      x @ kernel; its gradient is rounded to the type of x before it is used.
    Source: ours.
    """
    return _forward(x, kernel, sums)[0]


def _forward(x, kernel, sums):
    del sums
    half = kernel.astype(x.dtype)  # and not the kernel, which devices would gather in float32
    return jnp.matmul(x, half, preferred_element_type=jnp.float32), (x, half, kernel[:0])


def _backward(sums, saved, dy):
    x, half, kernel = saved
    dy = dy.astype(x.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    dx = jnp.einsum("BTn,mn->BTm", dy, half, **f32)
    dkernel = jnp.einsum("BTm,BTn->mn", x, dy, preferred_element_type=sums)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)
