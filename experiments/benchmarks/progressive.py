"""Drawing in few passes against drawing code after code: seconds a picture, and how many times.

    python experiments/benchmarks/progressive.py [--quick] [--json]

Both priors have the same sizes and random weights, float32; the same captions are read, grids of
codes come out, and no picture is decoded. The autoregressive one has its caches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro
from measure import Options, Report, drawn, median_time
from train_step import SHIPPED, SMALL, WIDE, prior_batch

from dalle_jax.generate import autoregressive, progressive
from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.models.transformer import Prior


class Case(NamedTuple):
    """One size of both priors."""

    sizes: dict
    batches: tuple[int, ...] = (1, 32)
    stages: tuple[int, ...] = (4, 8, 16, 32)
    target: float | None = None
    """How many times as fast it should be for one picture, with some number of stages."""


PEOPLE = {"width": 128, "depth": 6, "heads": 4, "text_vocabulary": 512, "text_length": 24}
PEOPLE |= {"grid": 8, "codes": 1024}

CASES = {
    "people": Case(PEOPLE),
    "shipped": Case(SHIPPED),
    "small": Case(SMALL, target=13),
    "12 layers": Case(WIDE | {"depth": 12}, batches=(1,), target=13),
}
QUICK = ("people b1",)


def main(options: Options) -> None:
    """Runs all cases."""
    report = Report("progressive", as_json=options.json)
    for name, case in CASES.items():
        for batch in case.batches:
            label = f"{name} b{batch}"
            if options.wanted(label, QUICK):
                compare(report, label, case, batch)


def compare(report, label, case, batch):
    """One size and batch: the autoregressive prior, then each number of stages."""
    config = PriorConfig(**case.sizes)
    text = jnp.asarray(prior_batch(config, batch)["text"])
    keys = jax.random.split(jax.random.key(0), batch)
    each = seconds(config, text, keys, autoregressive.sample) / batch
    report.add(label, "autoregressive", each, "s/picture")
    config = PriorConfig(**case.sizes, style="progressive")
    for stages in case.stages:

        def sample(*inputs, stages=stages):
            return progressive.sample(*inputs, stages=stages)[-1]

        took = seconds(config, text, keys, sample) / batch
        report.add(label, f"{stages} stages", took, "s/picture")
        target = case.target if batch == 1 and stages == min(case.stages) else None
        report.add(label, f"{stages} stages, faster", each / took, "x", target)
    report.look()


def seconds(config, text, keys, sample):
    """The time of drawing one grid for each key."""
    method = "predict" if config.style == "progressive" else None
    grid = jnp.zeros((1, config.image_length), jnp.int32)
    params = drawn(lambda *inputs: Prior(config).init(*inputs, method=method), text[:1], grid)
    program = jax.jit(lambda *inputs: sample(config, *inputs)).lower(params, text, keys).compile()
    return median_time(program, params, text, keys, seconds=4, least=1, warm=0)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
