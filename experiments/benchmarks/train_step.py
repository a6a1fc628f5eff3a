"""The update of the training loop: examples a second and share of the matrix-product peak.

    python experiments/benchmarks/train_step.py [--quick] [--json] [--peer PYTHON HARNESS]

float32, random ids and images. FLOP: 6 for each multiplication of a forward pass; see
docs/performance.md.
"""

import statistics

import counting
import jax
import numpy as np
import tyro
from measure import PeerOptions, Report, peer_rates, times

import dalle_jax
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.train import state as state_lib
from dalle_jax.train.dvae_stage import DVAEStage, short_dvae_run
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.train_step import make_train_step

SMALL = {"width": 256, "depth": 8, "heads": 8, "text_vocabulary": 2048, "text_length": 32}
SMALL |= {"grid": 16, "codes": 1024}
WIDE = {"width": 512, "depth": 4, "heads": 8, "text_vocabulary": 16384, "text_length": 256}
WIDE |= {"grid": 32, "codes": 8192}
SHIPPED = {"width": 192, "depth": 6, "heads": 6, "text_vocabulary": 2048, "text_length": 32}
SHIPPED |= {"grid": 16, "codes": 512}

# case: sizes, batch, share of the peak wanted, the peer's name for the same shapes
PRIORS = {
    "small sparse": (PriorConfig(**SMALL), 8, 0.45, "train/small/axial"),
    "small dense": (PriorConfig(**SMALL, attention="dense"), 8, None, "train/small/full"),
    "wide sparse": (PriorConfig(**WIDE), 2, 0.55, "train/wide/axial"),
    "wide dense": (PriorConfig(**WIDE, attention="dense"), 2, None, "train/wide/full"),
    "shipped sparse": (PriorConfig(**SHIPPED), 8, None, None),
}
# case: sizes, pixels, batch, share of the peak wanted, the peer's name for the same shapes
DVAES = {
    "dVAE 64 px": (
        DVAEConfig(width=64, blocks_per_group=1, codes=1024),
        64,
        8,
        0.4,
        "dvae/openai/train",
    ),
    "dVAE shipped 32 px": (
        DVAEConfig(width=64, groups=3, blocks_per_group=1, codes=512, residual_gain=0.3),
        32,
        8,
        0.4,
        None,
    ),
}
QUICK = ("small sparse", "dVAE 64 px")
TARGETS = {"samples/s": 2.0, "images/s": 1.0}  # of the peer's rate


def main(options: PeerOptions) -> None:
    """Runs all cases."""
    report = Report("train_step", as_json=options.json)
    seconds = 2 if options.quick else 6
    for case, (config, batch, target, item) in PRIORS.items():
        if options.wanted(case, QUICK):
            rate = prior(report, case, config, batch, target=target, seconds=seconds)
            _beside_peer(report, options, case, rate, "samples/s", item)
    for case, (config, px, batch, target, item) in DVAES.items():
        if options.wanted(case, QUICK):
            rate = dvae(report, case, config, px, batch, target=target, seconds=seconds)
            _beside_peer(report, options, case, rate, "images/s", item)


def prior(report, case, config, batch, *, target=None, seconds=6.0):
    """One size of the prior; gives samples a second."""
    taken = step_time(prior_stage(config, batch), prior_batch(config, batch), seconds=seconds)
    report.look()
    work = counting.prior_forward(config)
    _add(report, case, batch, taken, "samples/s")
    peak = 1e9 * report.machine["gemm_gflops"]
    report.add(case, "linear FLOP", 6 * batch * work.linear / taken / 1e9, "GFLOP/s")
    report.add(case, "linear share of peak", 6 * batch * work.linear / taken / peak, "")
    report.add(case, "share of peak", 6 * batch * work.total / taken / peak, "", target)
    return batch / taken


def dvae(report, case, config, px, batch, *, target=None, seconds=6.0):
    """One size of the dVAE; gives images a second."""
    taken = step_time(dvae_stage(config, px, batch), dvae_batch(px, batch), seconds=seconds)
    report.look()
    work = counting.encoder_forward(config, px) + counting.decoder_forward(config, px)
    _add(report, case, batch, taken, "images/s")
    share = 6 * batch * work / taken / (1e9 * report.machine["gemm_gflops"])
    report.add(case, "share of peak", share, "", target)
    return batch / taken


def step_time(stage, batch, *, seconds=6.0):
    """Median seconds of an update, EMA and metrics included."""
    loop = stage.run.loop
    update = make_train_step(stage, ema_every=loop.ema_every, ema_decay=loop.ema_decay)
    state = state_lib.init_state(stage, jax.random.key(0))

    def step():  # an update consumes the state that it is given
        nonlocal state
        state, metrics = update(state, batch)
        return metrics["param_norm"], state.params

    return statistics.median(times(step, seconds=seconds))


def prior_stage(config, batch, **changes):
    """The stage of a training run, with the short recipe and changes of it."""
    shipped = dalle_jax.load("emoji")  # a stage wants these for its sheets alone
    loop = LoopConfig(steps=10_000)
    return PriorStage(
        short_prior_run(model=config, loop=loop, batch_size=batch, **changes),
        codec_model=shipped,
        tokenizer=shipped.tokenizer,
        validation=lambda: iter(()),
        captions=(),
    )


def prior_batch(config, batch):
    """Random ids: half of the caption slots are pads."""
    rng = np.random.default_rng(0)
    slots = config.text_length - 1
    text = rng.integers(config.text_vocabulary, size=(batch, slots), dtype=np.int32)
    pads = config.text_vocabulary + np.arange(slots, dtype=np.int32)
    text = np.where(np.arange(slots) < slots // 2, text, pads)
    grid = (batch, config.grid, config.grid)
    return {"text": text, "codes": rng.integers(config.codes, size=grid, dtype=np.int32)}


def dvae_stage(config, px, batch):
    """The stage of a training run, with the short recipe but for its start from clusters."""
    run = short_dvae_run(
        model=config, loop=LoopConfig(steps=10_000), px=px, batch_size=batch, kmeans_init=False
    )
    return DVAEStage(run, init_images=lambda: None, validation=lambda: iter(()))


def dvae_batch(px, batch):
    """Random pixels."""
    rng = np.random.default_rng(0)
    return {"image": rng.integers(256, size=(batch, px, px, 3), dtype=np.uint8)}


def _add(report, case, batch, taken, unit):
    report.add(case, "update", 1e3 * taken, "ms")
    report.add(case, "rate", batch / taken, unit)


def _beside_peer(report, options, case, rate, unit, item):
    if options.peer and item:
        peers = peer_rates(options.peer, item, unit)[item]
        report.add(case, f"peer's rate ({item})", peers, unit)
        report.add(case, "rate over the peer's", rate / peers, "x", TARGETS[unit])


if __name__ == "__main__":
    main(tyro.cli(PeerOptions, description=__doc__))
