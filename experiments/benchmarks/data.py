"""The input pipeline beside the update that it feeds.

    python experiments/benchmarks/data.py [--quick] [--json]

Synthetic records: codes with captions in shards, and pictures of coloured shapes as PNG. The share
is the time of a batch, made while nothing else runs, over that of an update: as if nothing
overlapped.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from measure import Options, Report
from train_step import DVAES, PRIORS, dvae_batch, dvae_stage, prior_batch, prior_stage, step_time

import dalle_jax
from dalle_jax.data.batches import batches
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.data.shards import CodeSource, write_codes

RECORDS = 2048
QUICK = ("shipped sparse", "dVAE shipped 32 px")


def main(options: Options) -> None:
    """Runs all cases."""
    report = Report("data", as_json=options.json)
    count = 100 if options.quick else 400
    for case in ("shipped sparse", "small sparse", "wide sparse"):
        if options.wanted(case, QUICK):
            config, batch, *_ = PRIORS[case]
            with tempfile.TemporaryDirectory() as folder:
                made = code_time(Path(folder), config, batch, count=count)
            update = step_time(prior_stage(config, batch), prior_batch(config, batch), seconds=3)
            _add(report, case, made, update)
    for case, (config, px, batch, *_) in DVAES.items():
        if options.wanted(case, QUICK):
            made = picture_time(px, batch, count=count)
            update = step_time(dvae_stage(config, px, batch), dvae_batch(px, batch), seconds=3)
            _add(report, case, made, update)


def code_time(folder, config, batch, *, count):
    """Seconds of a batch of codes and captions, from shards in a folder."""
    rng = np.random.default_rng(0)
    captions = [record["captions"] for record in _shapes(32)]
    records = (
        {
            "id": str(number),
            "captions": captions[number % len(captions)],
            "codes": rng.integers(config.codes, size=(config.grid, config.grid)),
            "errors": rng.random((config.grid, config.grid)),
        }
        for number in range(RECORDS)
    )
    write_codes(folder, records, meta={"codec": "random"})
    source = CodeSource(folder, codec_fingerprint="random")
    text = {"tokenizer": dalle_jax.load("emoji").tokenizer, "text_length": config.text_length}
    return _batch_time(
        source, count, batch_size=batch, px=64, crop="prior", bpe_dropout=0.1, **text
    )


def picture_time(px, batch, *, count):
    """Seconds of a batch of pictures, decoded and cropped for the dVAE."""
    return _batch_time(_shapes(px), count, batch_size=batch, px=px, crop="dvae")


def _shapes(px):
    source = ShapesSource("train", px=px)
    return [source[index] for index in range(len(source))]  # drawn once: only reading is timed


def _batch_time(source, count, **how):
    """Mean seconds of a batch, after a warm-up that also fills what is made ahead."""
    iterator = batches(source, seed=0, **how)
    for _ in range(20):
        next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return (time.perf_counter() - start) / count


def _add(report, case, made, update):
    report.add(case, "a batch", 1e3 * made, "ms")
    report.add(case, "an update", 1e3 * update, "ms")
    report.add(case, "share of an update", made / update, "", 0.05)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
