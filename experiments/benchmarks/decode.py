"""Drawing codes: time a step, codes a second, and share of what reading and multiplying allow.

    python experiments/benchmarks/decode.py [--quick] [--json] [--peer PYTHON HARNESS]

Whole grids through `sample`, float32, random weights, temperature 1; a step is the time of the
whole, reading the captions included, over the codes of a grid. The bound is the longer of reading
what a step needs at the measured bandwidth and of multiplying at the peak; see
docs/performance.md.
"""

from typing import NamedTuple

import counting
import jax
import jax.numpy as jnp
import tyro
from measure import PeerOptions, Report, drawn, median_time, own_read_gbs, peer_rates
from train_step import SHIPPED, SMALL, WIDE, prior_batch

from dalle_jax.generate.autoregressive_sampler import sample
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.prior_config import PriorConfig


class Case(NamedTuple):
    """One size of prior, and what is drawn with it."""

    sizes: dict
    batches: tuple[int, ...]
    layers: tuple[str, ...] = ("sparse", "dense")
    """"shared" are sparse ones whose images all have the same caption."""
    targets: tuple[float | None, ...] = (None, None)
    """Share of the bound that sparse layers should reach, for each batch."""
    peer: str | None = None
    """The harness's name for the same shapes."""


DEEP = WIDE | {"depth": 12}
CASES = {
    "small": Case(SMALL, (1, 16), peer="sample/small"),
    "wide": Case(WIDE, (1,), peer="sample/wide"),
    "12 layers": Case(DEEP, (1, 8, 32), ("sparse", "shared", "dense"), (0.6, 0.5, 0.5)),
    "shipped": Case(SHIPPED, (24,), ("sparse",)),
}
QUICK = ("small sparse b1", "12 layers sparse b1")
PEER_LAYERS = {"sparse": "axial", "dense": "full"}


def main(options: PeerOptions) -> None:
    """Runs all cases."""
    report = Report("decode", as_json=options.json)
    own = own_read_gbs()
    report.add("machine", "read without jax", own, "GB/s")
    for name, case in CASES.items():
        for batch, target in zip(case.batches, case.targets, strict=False):
            rates = {}
            for layers in case.layers:
                label = f"{name} {layers} b{batch}"
                if not options.wanted(label, QUICK):
                    continue
                attention = "dense" if layers == "dense" else "sparse"
                rate = decode(
                    report,
                    label,
                    PriorConfig(**case.sizes, attention=attention),
                    batch,
                    captions=1 if layers == "shared" else batch,
                    own=own,
                    target=None if layers == "dense" else target,
                )
                rates[layers] = rate
                if options.peer and case.peer:
                    item = f"{case.peer}/{PEER_LAYERS[layers]}"
                    _beside_peer(report, options.peer, label, rate, item, batch)
            if rates.keys() >= {"sparse", "dense"}:
                gain = rates["sparse"] / rates["dense"]
                report.add(f"{name} b{batch}", "sparse over dense", gain, "x", 2.0)


def decode(report, case, config, batch, *, captions, own, target=None):
    """One size and batch; gives codes a second.

    Args:
      report: where to print.
      case: its name there.
      config: sizes of the prior.
      batch: images side by side.
      captions: different captions among them, as many images for each.
      own: GB/s that the machine reads without jax.
      target: share of the bound wanted.
    """
    text = jnp.asarray(prior_batch(config, captions)["text"])
    keys = jax.random.split(jax.random.key(0), batch)
    grid = jnp.zeros((1, config.image_length), jnp.int32)
    params = drawn(AutoregressivePrior(config).init, text[:1], grid)
    program = jax.jit(lambda *inputs: sample(config, *inputs)).lower(params, text, keys).compile()
    taken = median_time(program, params, text, keys, seconds=4, least=1)
    report.look()
    step = taken / config.image_length
    report.add(case, "a step", 1e3 * step, "ms")
    report.add(case, "rate", batch / step, "codes/s")
    read, flop = counting.decode_step(config, batch, captions=captions)
    report.add(case, "read a step", 1e-6 * read, "MB")
    multiplying = flop / (1e9 * report.machine["gemm_gflops"])
    bound = max(read / (1e9 * report.machine["read_gbs"]), multiplying)
    report.add(case, "share of bound", bound / step, "", target)
    bound = max(read / (1e9 * own), multiplying)
    wanted = 0.4 if target and batch == 1 else None
    report.add(case, "share of bound without jax", bound / step, "", wanted)
    return batch / step


def _beside_peer(report, peer, case, rate, item, batch):
    """As shipped, where the peer's cache does nothing, repaired, and in its own fastest form."""
    rates = peer_rates(peer, item, "image tokens/s")
    for mode, target in (("shipped", None), ("cache", 4.0), ("opt", None)):
        peers = rates.get(f"{item}/{mode}/b{batch}")
        if peers is not None:
            report.add(case, f"peer's rate, {mode}", peers, "codes/s")
            report.add(case, f"rate over the peer's, {mode}", rate / peers, "x", target)


if __name__ == "__main__":
    main(tyro.cli(PeerOptions, description=__doc__))
