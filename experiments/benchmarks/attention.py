"""Blocked attention against dense: time and memory, forward and backward.

    python experiments/benchmarks/attention.py [--quick] [--json]

One layer without its linear maps, float32, 8 heads of 64, batch 2. First both forms at T = 1,280
(256 text positions and 32 x 32 codes), then the blocked form alone on larger and larger grids.
"""

import jax
import jax.numpy as jnp
import tyro
from measure import Options, Report, median_time

from dalle_jax.models.attention import blocked, dense
from dalle_jax.models.masks import attention_mask

TARGETS = {"row": 3.5, "column": 3.2, "conv": 2.5, "dense": None}
QUICK = [f"{kind} T=1280" for kind in TARGETS]
GRIDS = (16, 32, 64)


def main(options: Options) -> None:
    """Runs all cases."""
    report = Report("attention", as_json=options.json)
    for kind in TARGETS:
        if options.wanted(f"{kind} T=1280", QUICK):
            against_dense(report, kind, text=256, grid=32, seconds=1 if options.quick else 4)
    for kind in TARGETS:
        for grid in GRIDS:
            if options.wanted(f"{kind} grid {grid}", QUICK):
                by_grid(report, kind, text=256, grid=grid, seconds=2)


def against_dense(report, kind, *, text, grid, seconds, batch=2, heads=8, size=64):
    """Both forms of one layer kind."""
    case = f"{kind} T={text + grid**2}"
    shape = (batch, text + grid**2, heads, size)
    mask = jnp.asarray(attention_mask(kind, text_length=text, grid=grid))
    reference = _compiled(lambda q, k, v: dense(q, k, v, mask=mask), shape)
    fast = _blocked(kind, text, grid, shape)
    taken = {}
    for name, program in (("dense", reference), ("blocked", fast)):
        taken[name] = median_time(program, *_inputs(shape), seconds=seconds)
        report.add(case, f"{name}, forward + backward", 1e3 * taken[name], "ms")
    report.add(case, "speedup", taken["dense"] / taken["blocked"], "x", TARGETS[kind])
    report.add(case, "temporary memory", _temporary(fast) / 2**20, "MiB")
    share = _temporary(fast) / _temporary(reference)
    report.add(case, "temporary memory of dense's", share, "x", None if kind == "dense" else 0.5)
    report.look()


def by_grid(report, kind, *, text, grid, seconds, batch=2, heads=8, size=64):
    """The blocked form of one layer kind."""
    case = f"{kind} grid {grid}"
    shape = (batch, text + grid**2, heads, size)
    program = _blocked(kind, text, grid, shape)
    taken = median_time(program, *_inputs(shape), seconds=seconds)
    report.add(case, "forward + backward", 1e3 * taken, "ms")
    report.add(case, "a code", 1e6 * taken / (batch * grid**2), "us")
    report.add(case, "temporary memory", _temporary(program) / 2**20, "MiB")


def _blocked(kind, text, grid, shape):
    def look(q, k, v):
        return blocked(q, k, v, kind=kind, text_length=text, grid=grid)

    return _compiled(look, shape)


def _compiled(look, shape):
    """The gradients of a weighted sum of the output, in query, key and value."""

    def gradients(weights, *inputs):
        return jax.grad(lambda inputs: jnp.sum(look(*inputs) * weights))(inputs)

    return jax.jit(gradients).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 4).compile()


def _inputs(shape):
    return jax.random.normal(jax.random.key(0), (4, *shape))


def _temporary(program):
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
