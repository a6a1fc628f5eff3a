"""Which changes of the VQ-GAN help an equal small prior, and not PSNR alone, on people.

    python experiments/codec_study.py prepare --out runs/codecs.npz        # needs dalle_jax[emoji]
    python experiments/codec_study.py train --data runs/codecs.npz --out runs/codecs.jsonl
    python experiments/codec_study.py table --lines runs/codecs.jsonl
    python experiments/codec_study.py sheet --data runs/codecs.npz --lines runs/codecs.jsonl \
        --out runs/codecs.png

Each variant of the tokenizer (codec_variants.py) differs from its base in one thing. It learns for
a number of updates, then a progressive prior of `people.py` learns its codes for another, and
samples images. What is in the file already is not trained again. What was measured: docs/vqgan.md.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import recipes
from codec_variants import START_IMAGES, VARIANTS, Codec, DecoderOnly, Variant
from recipe_programs import Program, Recipe
from recipes import Table, load, read

import dalle_jax
from dalle_jax.evaluate import distances
from dalle_jax.evaluate.features import efficientnet_network
from dalle_jax.generate.micro_batching import micro_batches
from dalle_jax.image import pixels
from dalle_jax.image.sheet import contact_sheet, save_png
from dalle_jax.models.codec import code_use
from dalle_jax.train.state import init_state
from dalle_jax.train.train_step import make_train_step

log = logging.getLogger("dalle_jax.codec_study")

SHOWN = 8  # held-out images on the sheet
IMAGE_BYTES = 2**24  # that encoding or decoding an image takes, at most
COLUMNS = {
    "parameters": "{:,}",
    "PSNR": "{:.1f}",
    "foreground": "{:.1f}",
    "KID": "{:.0f}",
    "codes in use": "{:,}",
    "nats an image, seen": "{:.0f}",
    "nats an image, held out": "{:.0f}",
    "nats a code, held out": "{:.2f}",
    "right, seen": "{:.0%}",
    "right, held out": "{:.0%}",
    "KID of samples": "{:.0f}",
    "minutes": "{:.1f}",
}


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Collect images and tokens of captions once, in a file that `train` needs."""

    out: Path
    """The file, .npz."""
    model: str = "people"
    """Shipped model, or a model folder: its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train variants and a prior on each, judge them, and add a line of JSON for each to a file."""

    data: Path
    """From `prepare`."""
    out: Path
    """File of JSON lines; variants that have one are left out. Beside it lies what they decode."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which ones."""
    codec_updates: int = 600
    """Of each tokenizer."""
    codec_batch: int = 8
    """Images in an update of it."""
    codec_width: int = 48
    """Channels of its first group."""
    prior_updates: int = 1_000
    """Of each prior."""
    images: int = 70
    """Captions of training to sample, and as many that were held out, of which there are 70."""
    seed: int = 0
    """First weights, batches and orders of tokenizer and prior."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Show held-out images, and below them what each variant decodes."""

    data: Path
    """From `prepare`."""
    lines: Path
    """From `train`."""
    out: Path
    """The sheet, .png."""


@dataclass(frozen=True)
class Codes(Program):
    """The progressive prior of `people.py`, for other codes."""

    grid: int = 8
    codes: int = 1024

    def run(self, steps: int):
        """Its sizes and schedules."""
        start = super().run(steps)
        model = replace(start.model, grid=self.grid, codes=self.codes)
        return replace(start, model=model)


def prepare(options: Prepare) -> None:
    """Writes images and tokens, those of training first."""
    images, arrays = recipes.people(64, dalle_jax.load(options.model).tokenizer)
    recipes.save(options.out, images=images, **arrays)


def train(options: Train) -> None:
    """Trains and judges the variants, one after the other."""
    data, truth = load(options.data), Truth(options)
    done = {(x["variant"], x["seed"]) for x in read(options.out)} if options.out.exists() else set()
    for name in options.variants:
        if (name, options.seed) in done:
            continue
        start = time.perf_counter()
        stage, params = train_codec(VARIANTS[name], data["images"][data["seen"]], options)
        codec_minutes = (time.perf_counter() - start) / 60
        codes = in_chunks(stage.encode, params, data["images"])
        decoded = in_chunks(stage.decode, params, codes[~data["seen"]])
        line = {
            "variant": name,
            "seed": options.seed,
            "codec updates": options.codec_updates,
            "codec minutes": codec_minutes,
            "parameters": sum(x.size for x in jax.tree.leaves(stage.network(params))),
            **truth.judge_decoded(decoded),
            "codes in use": code_use(np.bincount(codes.ravel()))[0],
        }
        log.info("%s: %s", name, line)
        start = time.perf_counter()
        nats, sampled = train_prior(data, codes, truth.own, stage.run.model.codes, options)
        images = in_chunks(stage.decode, params, sampled)
        line |= truth.judge_samples(nats, images, cells=codes[0].size)
        prior_minutes = (time.perf_counter() - start) / 60
        line |= {"prior updates": options.prior_updates, "prior minutes": prior_minutes}
        line |= {"minutes": codec_minutes + prior_minutes}
        np.save(decoded_file(options.out, name, options.seed), decoded[shown(len(decoded))])
        recipes.add(options.out, line)


def train_codec(variant: Variant, images: np.ndarray, options: Train) -> tuple[Codec, dict]:
    """Trains a tokenizer, and its decoder alone at the end where the variant says so."""
    last = round(options.codec_updates * variant.decoder_alone)

    def run(steps):
        return variant.settings(options.codec_width, steps, options.codec_batch, options.seed)

    rng = np.random.default_rng(options.seed)
    order = recipes.epochs(rng, len(images), options.codec_updates, options.codec_batch)
    start = images[rng.permutation(len(images))[:START_IMAGES]]
    split = len(order) - last
    stage = variant.stage(run(split), start)
    params = update(stage, images, order[:split], options.seed)
    if not last:
        return stage, params
    stage = DecoderOnly(run(last), start, params=params)
    return stage, update(stage, images, order[split:], options.seed)


def update(stage: Codec, images: np.ndarray, order: np.ndarray, seed: int) -> dict:
    """Trains a stage on the images of each update; gives the last parameters."""
    state = init_state(stage, jax.random.key(seed))
    state = state.replace(params=stage.init_from_data(state.params), ema_params=())
    step = make_train_step(stage, ema_every=None)
    for number, chosen in enumerate(order):
        state, metrics = step(state, {"image": images[chosen]})
        if (number + 1) % 100 == 0:
            log.info("update %d: pixels %.4f", number + 1, metrics["pixels"])
    return state.params


def train_prior(data, codes, own, K: int, options: Train) -> tuple[np.ndarray, np.ndarray]:
    """Trains a prior; gives nats a code [2], and samples [2 * images, G, G]."""
    G = codes.shape[1]
    program = Codes(grid=G, codes=K)
    data = {**data, "codes": codes.reshape(len(codes), -1).astype(np.int32)}
    args = recipes.inputs(data, [Recipe()], options.prior_updates, [options.seed])
    numbers, *_, text, all_codes, _ = args
    params = program.lower(recipes.training(program, options.prior_updates), *args).compile()(*args)
    args = (numbers, params["last"], text[own], all_codes[own])
    judge = program.lower(recipes.judging(program, options.prior_updates), *args).compile()
    nats, samples = (np.asarray(x)[0, 0] for x in judge(*args))
    return nats, samples.reshape(-1, G, G)


class Truth:
    """The true images: those to be sampled, half of them held out, and others."""

    def __init__(self, options: Train):
        data = load(options.data)
        self.own = recipes.to_sample(data["seen"], options.images)
        self.images, self.held_out = data["images"], data["images"][~data["seen"]]
        self.network = efficientnet_network()

    def judge_decoded(self, decoded: np.ndarray) -> dict[str, float]:
        """What the codes of the held-out images keep of them: mean dB, and KID times 1,000."""
        psnr, foreground = (x.mean() for x in pixels.decibels(self.held_out, decoded))
        kid = self.distance(self.held_out, decoded)
        return {"PSNR": float(psnr), "foreground": float(foreground), "KID": kid}

    def judge_samples(
        self, nats: np.ndarray, images: np.ndarray, *, cells: int
    ) -> dict[str, float]:
        """Nats, the share of samples nearest to their own true image, and their KID, held out."""
        sampled, true = (x.reshape(len(x), -1).astype(np.float32) for x in (images, self.images))
        right = recipes.share_right(sampled, true, self.own)
        found = {}
        for i, half in enumerate(("seen", "held out")):
            found[f"nats a code, {half}"] = float(nats[i])
            found[f"nats an image, {half}"] = float(nats[i] * cells)
            found[f"right, {half}"] = float(right[i])
        held_out = self.own[1]
        kid = self.distance(self.images[held_out], images[len(held_out) :])
        return found | {"KID of samples": kid}

    def distance(self, images: np.ndarray, others: np.ndarray) -> float:
        """The KID times 1,000 of images and what is made of each."""
        return 1000 * paired_distance(*(self.network(x)[0] for x in (images, others)))


def paired_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The KID of features [N, D] whose rows belong together.

    An image and what is made of it are not independent, so that pair is left out, as
    an image with itself is: this keeps the estimate unbiased.
    """
    kernel = [
        distances.kernel_sum(x.astype(float), y.astype(float), same=True)
        for x, y in ((first, first), (second, second), (first, second))
    ]
    return float((kernel[0] + kernel[1] - 2 * kernel[2]) / (len(first) * (len(first) - 1)))


def in_chunks(function, params, arrays: np.ndarray) -> np.ndarray:
    """Applies a function of parameters to many arrays, some at a time."""
    function, parts = jax.jit(function), []
    for indices, valid in micro_batches(len(arrays), IMAGE_BYTES):
        parts.append(np.asarray(function(params, jnp.asarray(arrays[indices])))[:valid])
    return np.concatenate(parts)


def shown(images: int) -> np.ndarray:
    """The held-out images of the sheet."""
    return np.linspace(0, images - 1, SHOWN).astype(int)


def decoded_file(lines: Path, variant: str, seed: int) -> Path:
    """Where what a variant decodes lies."""
    return lines.with_name(f"{lines.stem}-{variant}-{seed}.npy")


def table(options: Table) -> None:
    """Prints a row for each variant and seed, in the order of their list."""
    order = list(VARIANTS)
    lines = sorted(read(options.lines), key=lambda x: (order.index(x["variant"]), x["seed"]))
    print(f"| variant | {' | '.join(COLUMNS)} |", f"|{' --- |' * (len(COLUMNS) + 1)}", sep="\n")
    for line in lines:
        name = line["variant"] + (f", seed {line['seed']}" if line["seed"] else "")
        cells = [form.format(line[column]) for column, form in COLUMNS.items()]
        print(f"| {' | '.join([name, *cells])} |")


def sheet(options: Sheet) -> None:
    """Writes the sheet, with the true images on top; of the first seed."""
    data = load(options.data)
    true = data["images"][~data["seen"]]
    rows = {"truth": true[shown(len(true))]}
    for name in VARIANTS:
        if (file := decoded_file(options.lines, name, 0)).exists():
            rows[name] = np.load(file)
    save_png(options.out, contact_sheet(np.stack(list(rows.values())), list(rows)))


if __name__ == "__main__":
    recipes.run_command({Prepare: prepare, Train: train, Table: table, Sheet: sheet}, __doc__)
