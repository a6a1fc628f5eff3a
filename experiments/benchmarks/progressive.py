"""Drawing in few passes against drawing code after code: seconds an image, and how many times.

    python experiments/benchmarks/progressive.py [--quick] [--json]

Both priors have the same sizes and random weights, float32; the same captions are read, grids of
codes come out, and no image is decoded. The autoregressive one has its caches.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro
from measure import Options, Report, drawn, median_time
from train_step import SHIPPED, SMALL, WIDE, prior_batch

from dalle_jax.generate import autoregressive_sampler, progressive_sampler
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import autoregressive_prior, progressive_prior
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig


class Case(NamedTuple):
    """One size of both priors."""

    sizes: dict
    batches: tuple[int, ...] = (1, 32)
    stages: tuple[int, ...] = (4, 8, 16)
    target: float | None = None
    """How many times as fast it should be for one image, with 16 stages in random order."""


PEOPLE = {"width": 128, "depth": 6, "heads": 4, "text_vocabulary": 512, "text_length": 24}
PEOPLE |= {"grid": 8, "codes": 1024}

CASES = {
    "people": Case(PEOPLE, target=3),
    "shipped": Case(SHIPPED, target=3),
    "small": Case(SMALL, target=3),
    "12 layers": Case(WIDE | {"depth": 12}, batches=(1,), target=8),
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
    params = drawn(partial(autoregressive_prior.init_params, config))
    each = seconds(partial(autoregressive_sampler.sample, config), params, text, keys) / batch
    report.add(label, "autoregressive", each, "s/image")
    config = ProgressiveConfig(**case.sizes, query_depth=config.depth // 2)
    params = drawn(partial(progressive_prior.init_params, config))
    for order in ("random", "dynamic", "confidence"):
        for stages in case.stages:
            sampling = SamplingConfig(stages=stages, order=order)
            sample = partial(progressive_sampler.sample, config, sampling=sampling)
            took = seconds(sample, params, text, keys) / batch
            report.add(label, f"{stages} stages, {order}", took, "s/image")
            target = case.target if (batch, stages, order) == (1, 16, "random") else None
            report.add(label, f"{stages} stages, {order}, faster", each / took, "x", target)
    report.look()


def seconds(sample, *inputs):
    """The time of drawing one grid for each key."""
    program = jax.jit(sample).lower(*inputs).compile()
    return median_time(program, *inputs, seconds=4, least=1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
