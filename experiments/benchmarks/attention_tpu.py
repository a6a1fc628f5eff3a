"""Attention of one layer, compiled for a TPU by its own compiler: bytes, FLOP and memory.

    python experiments/benchmarks/attention_tpu.py --topology v5e:2x2 --heads 8

Nothing runs: the numbers are the compiler's count of the optimised program, of the forward and the
backward pass of one layer of each kind at the paper's length. Needs `pip install dalle_jax[tpu]`.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.models.attention import blocked, dense
from dalle_jax.models.masks import Kind, attention_mask
from dalle_jax.models.splash import splash
from dalle_jax.planner.topology import tpu_devices


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    topology: str = "v5e:2x2"
    """Slice of TPUs; one chip of it is used."""
    batch: int = 1
    """Images B."""
    heads: int = 8
    """Attention heads N."""
    head_size: int = 64
    """Width H of a head."""
    text_length: int = 256
    """Text positions P."""
    grid: int = 32
    """Side G of the square of image positions."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of layer."""
    forms: tuple[str, ...] = ("dense", "blocked", "splash")
    """Forms of attention."""


def main(options: Options) -> None:
    """Prints one JSON line for each kind and form."""
    mesh = Mesh(np.asarray(tpu_devices(options.topology)[:1]), ("all",))
    place = NamedSharding(mesh, PartitionSpec())
    T = options.text_length + options.grid**2
    shape = (options.batch, T, options.heads, options.head_size)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    sizes = {"text_length": options.text_length, "grid": options.grid}
    for kind in options.kinds:
        forms = {
            "dense": partial(dense, mask=attention_mask(kind, **sizes)),
            "blocked": partial(blocked, kind=kind, **sizes),
            "splash": partial(splash, kind=kind, **sizes),
        }
        for form in options.forms:

            def update(query, key, value, gradient, attend=forms[form]):
                seen, backward = jax.vjp(attend, query, key, value)
                return seen, *backward(gradient)

            start = time.monotonic()
            compiled = jax.jit(update, out_shardings=place).lower(x, x, x, x).compile()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            print(
                json.dumps(
                    {
                        "kind": kind,
                        "form": form,
                        "GB accessed": cost["bytes accessed"] / 1e9,
                        "GFLOP": cost["flops"] / 1e9,
                        "MB temporaries": memory.temp_size_in_bytes / 1e6,
                        "compiled in s": round(time.monotonic() - start, 1),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options))
