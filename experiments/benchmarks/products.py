"""What bounds drawing: products of a layer's kernel and a few columns, and smaller weights.

    python experiments/benchmarks/products.py [--quick] [--json]

A step of drawing multiplies each kernel once with one column an image. 24 kernels of 2,048 x 512
(100 MB of float32) are more than the caches hold, so that reading them is the bound for few
columns. The rate counts their float32 bytes whatever is stored, so that rows can be compared.
"""

import jax
import jax.numpy as jnp
import tyro
from measure import Options, Report, median_time

LAYERS, STEPS = 24, 10
COLUMNS = (1, 8, 32)


def main(options: Options) -> None:
    """Runs all forms for all widths."""
    report = Report("products", as_json=options.json)
    kernels = jax.random.normal(jax.random.key(0), (LAYERS, 2048, 512))
    for columns in COLUMNS:
        for form in FORMS:
            case = f"{form}, {columns} columns"
            if options.wanted(case, [f"{form}, 1 columns" for form in FORMS]):
                measure(report, case, form, kernels, columns, seconds=2 if options.quick else 4)


def measure(report, case, form, kernels, columns, *, seconds=4.0):
    """One form: milliseconds of all layers once, and the rate of weights."""
    shrink, multiply = FORMS[form]
    _, _, D = kernels.shape

    @jax.jit
    def steps(weights, x):
        def step(_, x):
            # bound to x, or XLA would widen all weights once, before the loop
            held, x = jax.lax.optimization_barrier((weights, x))
            for layer in held:
                x = x + 1e-6 * multiply(layer, x)[:D]
            return x

        return jax.lax.fori_loop(0, STEPS, step, x)

    x = jnp.ones((D, columns))
    weights = [jax.jit(shrink)(kernel) for kernel in kernels]  # a slice of a stack is copied
    taken = median_time(steps, weights, x, seconds=seconds) / STEPS
    report.add(case, "all kernels once", 1e3 * taken, "ms")
    report.add(case, "float32 weights", 1e-9 * kernels.nbytes / taken, "GB/s")


def _to_int8(kernels):
    scale = jnp.abs(kernels).max(-1, keepdims=True) / 127
    return jnp.round(kernels / scale).astype(jnp.int8), scale


def _widened(weights, x):
    kernel, scale = weights
    return scale * (kernel.astype(jnp.float32) @ x)


def _whole_numbers(weights, x):
    kernel, scale = weights
    unit = jnp.abs(x).max(0, keepdims=True) / 127
    whole = jnp.round(x / unit).astype(jnp.int8)
    return scale * unit * jnp.matmul(kernel, whole, preferred_element_type=jnp.int32)


# form: how weights are stored, how they are multiplied
FORMS = {
    "float32": (lambda kernels: kernels, jnp.matmul),
    "bfloat16": (
        lambda kernels: kernels.astype(jnp.bfloat16),
        lambda kernel, x: jnp.matmul(
            kernel, x.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        ),
    ),
    "int8 widened": (_to_int8, _widened),
    "int8 x int8": (_to_int8, _whole_numbers),
}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
