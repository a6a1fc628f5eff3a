"""Everything to know about one GPU or TPU, in pieces that each take less than a minute or two.

    python experiments/benchmarks/accelerator.py --out accelerator.jsonl [--quick]

Peaks of the machine; model FLOP utilisation of training; the share of the memory's bandwidth that
decoding reaches; progressive against autoregressive sampling; forms of attention. Each finished
piece is a line of `--out`. Started again, the script goes on with what is missing; at the end it
prints the table.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import counting
import jax
import jax.numpy as jnp
import train_step
import tyro
from measure import drawn, median_time, times

from dalle_jax.generate import autoregressive_sampler, progressive_sampler
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import autoregressive_prior, progressive_prior
from dalle_jax.models.attention import blocked, dense
from dalle_jax.models.masks import attention_mask
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.models.splash import splash

PAPER = {"text_vocabulary": 16384, "text_length": 256, "grid": 32, "codes": 8192}
SIZES = {
    "300M": {"width": 1024, "depth": 24, "heads": 16} | PAPER,
    "1.3B": {"width": 2048, "depth": 24, "heads": 32} | PAPER,
}
QUICK = {"300M": {"width": 32, "depth": 2, "heads": 2, "text_vocabulary": 64, "text_length": 8}}
QUICK["300M"] |= {"grid": 4, "codes": 32}

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    out: Path = Path("accelerator.jsonl")
    """File of finished pieces; those in it are not measured again."""
    batch: int = 16
    """Images in an update."""
    quick: bool = False
    """Toy sizes, to see that everything runs: no number means anything then."""


def main(options: Options) -> None:
    """Measures what is missing and prints everything."""
    done = read(options.out)
    for name, measure in pieces(options).items():
        if name in done:
            continue
        start = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # the other pieces are worth having all the same
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        found["took s"] = time.monotonic() - start
        line = {"piece": name, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        with options.out.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line | {"numbers": found}))  # what was cut short ends here
            file.flush()
            os.fsync(file.fileno())
        print(f"{name}: done in {found['took s']:.0f} s", flush=True)
    for name, numbers in read(options.out).items():
        for metric, value in numbers.items():
            print(f"{name:<28}{metric:<36}{value:>12.5g}")


def read(path: Path) -> dict[str, Numbers]:
    """The pieces in a file; a line that was cut short is measured again."""
    done = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            done[line["piece"]] = line["numbers"]
    return done


def pieces(options: Options) -> dict[str, Callable[[], Numbers]]:
    """Everything there is to measure, in the order of doing it."""
    sizes = QUICK if options.quick else SIZES
    batch = 2 if options.quick else options.batch
    found: dict[str, Callable[[], Numbers]] = {"machine": partial(machine, options.quick)}
    for name, config in sizes.items():
        found[f"train {name}"] = partial(training, config, batch)
    for name, config in sizes.items():
        for images in (1, 2) if options.quick else (1, 8, 64):
            found[f"sample {name} b{images}"] = partial(sampling, config, images)
    for kind in ("row", "column", "conv", "dense"):
        found[f"attention {kind}"] = partial(attention, kind, options.quick)
    return found


def machine(quick: bool) -> Numbers:
    """Its best at products of bfloat16 and at reading memory."""
    size, numbers = (256, 2**16) if quick else (8192, 2**29)
    square = jnp.ones((size, size), jnp.bfloat16)
    product = min(times(jax.jit(jnp.matmul), square, square, seconds=1, least=10))
    vector = jnp.ones(numbers, jnp.bfloat16)
    sums = jax.jit(lambda x: x.astype(jnp.float32).sum())
    reading = min(times(sums, vector, seconds=1, least=10))
    return {"bfloat16 TFLOP/s": 2e-12 * size**3 / product, "read GB/s": 2e-9 * numbers / reading}


def training(sizes: dict[str, Any], batch: int) -> Numbers:
    """An update of the prior in bfloat16, layers scanned and computed again."""
    config = PriorConfig(**sizes)
    stage = train_step.prior_stage(
        config, batch, precision="bfloat16", scan_layers=True, remat=True
    )
    taken = train_step.step_time(stage, train_step.prior_batch(config, batch), seconds=10)
    flop = 6 * batch * counting.prior_forward(config).total
    peak = machine(quick=config.width < 100)["bfloat16 TFLOP/s"]
    return {
        "ms an update": 1e3 * taken,
        "images/s": batch / taken,
        "model FLOP utilisation": 1e-12 * flop / taken / peak,
    }


def sampling(sizes: dict[str, Any], images: int) -> Numbers:
    """Seconds an image, autoregressive and progressive, with bfloat16 weights."""
    config = PriorConfig(**sizes)
    text = jnp.asarray(train_step.prior_batch(config, images)["text"])
    keys = jax.random.split(jax.random.key(0), images)

    def seconds(init, sample):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(init))
        program = jax.jit(sample).lower(params, text, keys).compile()
        return median_time(program, params, text, keys, seconds=4, least=2)

    taken = seconds(
        partial(autoregressive_prior.init_params, config),
        partial(autoregressive_sampler.sample, config),
    )
    read_bytes, _ = counting.decode_step(config, images, captions=images)
    rate = read_bytes * config.image_length / 2 / taken  # half of float32's bytes
    bandwidth = machine(quick=config.width < 100)["read GB/s"]
    found = {
        "autoregressive s/image": taken / images,
        "share of bandwidth": 1e-9 * rate / bandwidth,
    }
    config = ProgressiveConfig(**sizes, query_depth=config.depth // 2)
    for stages in (4, 8, 16):
        sample = partial(
            progressive_sampler.sample,
            config,
            sampling=SamplingConfig(stages=min(stages, config.image_length)),
        )
        each = seconds(partial(progressive_prior.init_params, config), sample)
        found[f"progressive, {stages} stages, s/image"] = each / images
        found[f"progressive, {stages} stages, faster"] = taken / each
    return found


def attention(kind: str, quick: bool) -> Numbers:
    """Milliseconds of one layer, forward and backward, by each form; splash on TPUs alone."""
    sizes = {"text_length": 8, "grid": 4} if quick else {"text_length": 256, "grid": 32}
    shape = (2, sizes["text_length"] + sizes["grid"] ** 2, 4 if quick else 16, 64)
    query, key, value, weight = jnp.ones((4, *shape), jnp.bfloat16)
    forms = {
        "dense": partial(dense, mask=attention_mask(kind, **sizes)),
        "blocked": partial(blocked, kind=kind, **sizes),
    }
    if jax.default_backend() == "tpu":
        forms["splash"] = partial(splash, kind=kind, **sizes)
    found = {}
    for name, attend in forms.items():

        def update(query, key, value, attend=attend):
            return jax.vjp(attend, query, key, value)[1](weight)

        found[f"{name} ms"] = 1e3 * median_time(jax.jit(update), query, key, value, seconds=1)
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
