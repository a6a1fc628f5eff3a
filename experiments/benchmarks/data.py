"""The input pipeline beside the update that it feeds.

    python experiments/benchmarks/data.py [--quick] [--json]

Synthetic records: codes with captions in shards, and images of coloured shapes as PNG. The share
is the time of a batch, made while nothing else runs, over that of an update: as if nothing
overlapped. The cases "of 10^N records" draw from a source that is made up as it is read: what an
example costs must not depend on how many there are, nor may memory.
"""

import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import tyro
from measure import Options, Report
from train_step import DVAES, PRIORS, dvae_batch, dvae_stage, prior_batch, prior_stage, step_time

import dalle_jax
from dalle_jax.data.batches import batches
from dalle_jax.data.code_shards import CodeSource, write_codes
from dalle_jax.data.shapes import ShapesSource

RECORDS = 2048
SIZES = {f"of 10^{n} records": 10**n for n in (4, 6, 8)}
QUICK = ("shipped sparse", "dVAE shipped 32 px", *SIZES)


def main(options: Options) -> None:
    """Runs all cases."""
    report = Report("data", as_json=options.json)
    count = 100 if options.quick else 400
    for case, records in SIZES.items():
        if options.wanted(case, QUICK):
            seconds, peak = example_cost(records, count=5 * count)
            report.add(case, "an example", 1e3 * seconds, "ms")
            report.add(case, "memory of Python and NumPy", peak / 2**20, "MiB", 10)
    for case in ("shipped sparse", "small sparse", "wide sparse"):
        if options.wanted(case, QUICK):
            config, batch, *_ = PRIORS[case]
            with tempfile.TemporaryDirectory() as folder:
                made = code_time(Path(folder), config, batch, count=count)
            update = step_time(prior_stage(config, batch), prior_batch(config, batch), seconds=3)
            _add(report, case, made, update)
    for case, (config, px, batch, *_) in DVAES.items():
        if options.wanted(case, QUICK):
            made = image_time(px, batch, count=count)
            update = step_time(dvae_stage(config, px, batch), dvae_batch(px, batch), seconds=3)
            _add(report, case, made, update)


class MadeUp:
    """So many records with codes, none of which exists before it is asked for."""

    def __init__(self, records):
        self._records = records
        self._codes, self._errors = np.zeros((32, 32), np.uint16), np.zeros((32, 32), np.float16)

    def __len__(self):
        return self._records

    def __getitem__(self, index):
        return {
            "id": str(index),
            "captions": [f"number {index}"],
            "codes": self._codes,
            "errors": self._errors,
        }


def example_cost(records, *, count):
    """Seconds of an example, in batches of one process without threads, and peak memory."""

    def run():
        iterator = batches(
            MadeUp(records), seed=0, batch_size=16, px=256, crop="prior", threads=0, **text
        )
        for _ in range(count // 16):
            next(iterator)

    text = {"tokenizer": dalle_jax.load("emoji").tokenizer, "text_length": 64}
    start = time.perf_counter()
    run()
    seconds = (time.perf_counter() - start) / count
    tracemalloc.start()  # apart from the time, which it makes longer
    try:
        run()
        return seconds, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def image_time(px, batch, *, count):
    """Seconds of a batch of images, decoded and cropped for the dVAE."""
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
