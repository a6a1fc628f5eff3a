"""What the order of filling is worth: priors that differ in nothing else, on emoji of people.

    python experiments/orders.py train --workdir runs/orders       # every prior; goes on if stopped
    python experiments/orders.py draw --workdir runs/orders --out docs/orders.md

One designer's people with one skin tone, 32 px, with one caption each: a caption then has one true
picture, and a drawing is right if no other of the true pictures, training's and held-out ones
alike, is nearer to it. The codes are those of the shipped dVAE, 8 x 8. `draw` writes a table of all
priors, numbers of stages, revision and guidance, and a picture of the mean orders beside it.
"""

import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import dalle_jax
from dalle_jax.compiled import keep_programs
from dalle_jax.data.emoji import ATTRIBUTION, emoji_source
from dalle_jax.evaluate.distances import kernel_distance
from dalle_jax.evaluate.features import efficientnet_network
from dalle_jax.generate import autoregressive, progressive
from dalle_jax.generate.model import Model
from dalle_jax.image import pixels
from dalle_jax.memory import keep_memory
from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.models.transformer import Prior
from dalle_jax.terminal import show_log_lines
from dalle_jax.train.experiment import Data, train_prior
from dalle_jax.train.log import read_metrics
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.orders import order_scores, ranks
from dalle_jax.train.prior import PriorRun, short_prior_run
from dalle_jax.train.progressive import in_progressive_style

PX, STYLE = 32, "twemoji"
AUTOREGRESSIVE = "autoregressive"
TRAINED = (AUTOREGRESSIVE, "dynamic", "certain", "uncertain", "random")
STAGES, REVISE, GUIDANCE = (4, 8, 16, 32), (0.0, 0.5), (1.0, 3.0)


class People:
    """The records of a split that show one person of one skin tone, each with its name alone."""

    def __init__(self, split: str):
        source = emoji_source(split, px=PX)
        records = (source[i] for i in range(len(source)))
        self._records = [
            record | {"captions": record["captions"][:1]}
            for record in records
            if record["style"] == STYLE
            and record["captions"][0].endswith("skin tone")
            and " and " not in record["captions"][0]
        ]

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the priors one after the other."""

    workdir: Path
    """Where they go, a folder each."""
    steps: int = 4_000
    """Updates of each."""
    only: tuple[str, ...] = TRAINED
    """Which ones, to share the work among processes."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draw with all priors that have been trained, and write the table."""

    workdir: Path
    """Where they are."""
    out: Path
    """Markdown file of the table; the orders go beside it, as PNG."""
    pictures: int = 70
    """Captions of training, and as many that were held out."""
    seed: int = 0
    """Of the drawings."""


def train(options: Train) -> None:
    """Trains each prior on the same pictures, in the same order, for as many updates."""
    tokens = shipped_codes()
    data = Data(
        train=People("train"),
        validation=People("heldout_cell"),
        captions=[People("train")[0]["captions"][0], People("heldout_cell")[0]["captions"][0]],
        attribution=ATTRIBUTION,
    )
    for name in options.only:
        run = run_of(options.steps)
        if name != AUTOREGRESSIVE:
            run = in_progressive_style(run, order=name)
        folder = options.workdir / name
        train_prior(run, data, tokens, workdir=folder).save(folder / "model")


def shipped_codes() -> Model:
    """The shipped dVAE, for smaller pictures."""
    shipped = dalle_jax.load("emoji")
    return Model(name="people", px=PX, codec=shipped.codec, codec_params=shipped.codec_params)


def run_of(steps: int) -> PriorRun:
    """20 text positions and 64 codes: 1.5M parameters."""
    sizes = {"width": 128, "depth": 6, "heads": 4, "text_vocabulary": 512, "text_length": 20}
    return short_prior_run(
        model=PriorConfig(**sizes, grid=8, codes=512),
        loop=LoopConfig(
            steps=steps, save_every=500, evaluate_every=1000, sheet_every=None,
            average_every=5, average_decay=0.98,
        ),
        batch_size=8,
        warmup_steps=100,
        bpe_dropout=0.0,
    )  # fmt: skip


def draw(options: Draw) -> None:
    """Draws everything and writes the table."""
    truth = Truth(options)
    rows, orders = [], {}
    for name in TRAINED:
        folder = options.workdir / name
        if not (folder / "model").is_dir():
            continue
        model = Model.load(folder / "model")
        measured = read_metrics(folder / "metrics.jsonl")[-1]
        mended = {k: measured.get(f"eval/{k}") for k in ("repaired", "damaged")}
        ways = [(None, 0.0)]
        if name != AUTOREGRESSIVE:
            ways = [(stages, revise) for stages in STAGES for revise in REVISE]
            orders |= mean_orders(model, name, truth)
        for stages, revise in ways:
            for guidance in GUIDANCE:
                codes, revised = drawn(
                    model, truth.captions, stages, revise, guidance, options.seed
                )
                row = {"prior": name, "stages": stages, "revise": revise, "guidance": guidance}
                row |= truth.compare(model.decode(codes)) | {"revised": revised} | mended
                rows.append(row)
                print(json.dumps(row), flush=True)
    write(options.out, rows, len(truth.all))
    draw_orders(orders, options.out.with_suffix(".png"))


class Truth:
    """The true pictures: those to be drawn, half of them held out, and all others."""

    def __init__(self, options):
        rng = np.random.default_rng(options.seed)
        self.splits = {split: People(split) for split in ("train", "heldout_cell")}
        chosen = {
            split: rng.permutation(len(people))[: options.pictures].tolist()
            for split, people in self.splits.items()
        }
        records = [people[i] for people in self.splits.values() for i in range(len(people))]
        names = [record["captions"][0] for record in records]
        self.captions = [
            self.splits[split][i]["captions"][0] for split, some in chosen.items() for i in some
        ]
        self.seen = np.arange(len(self.captions)) < len(chosen["train"])
        self.own = np.array([names.index(caption) for caption in self.captions])
        self.tones = np.array([name.rpartition(" with ")[2] for name in names])
        images = np.stack([pixels.decode(record["image"]) for record in records])
        codec = shipped_codes()
        self.codes, self.errors = codec.codes_and_errors(images)
        self.all = codec.decode(self.codes)  # what the codes can draw at best
        self._network = efficientnet_network()
        self._features = self._network(self.all[self.own])[0]

    def compare(self, images) -> dict[str, float]:
        """Shares that are right, and how far off they are."""
        flat = images.reshape(len(images), -1).astype(np.float64)
        true = self.all.reshape(len(self.all), -1).astype(np.float64)
        apart = (flat**2).sum(1)[:, None] + (true**2).sum(1)[None] - 2 * flat @ true.T
        apart /= flat.shape[1]
        nearest = apart.argmin(axis=1)
        right, tone = nearest == self.own, self.tones[nearest] == self.tones[self.own]
        decibels, _ = pixels.decibels(self.all[self.own], images)
        kid = kernel_distance(self._network(images)[0], self._features)
        return {
            "right, seen": float(right[self.seen].mean()),
            "right, held out": float(right[~self.seen].mean()),
            "tone right": float(tone.mean()),
            "decibels": float(np.mean(decibels)),
            "KID x 1000": 1000 * float(kid),
        }


def drawn(model, captions, stages, revise, guidance, seed):
    """Codes for each caption, and the share of all codes that a pass changed."""
    part = "prior" if stages is None else "progressive"
    config, params = model.priors[part]
    codes, revised = [], []
    for start in range(0, len(captions), 32):
        some = captions[start : start + 32]
        text = model.tokenizer.encode(some, length=config.text_length - 1)
        hashes = jnp.asarray([zlib.crc32(caption.encode()) for caption in some], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), hashes)
        if stages is None:
            found = autoregressive.sample(config, params, text, keys, guidance=guidance)
            revised.append(np.zeros(len(some)))
        else:
            passes = progressive.sample(
                config, params, text, keys, stages=stages, revise=revise, guidance=guidance
            )
            found = passes.cells[-1]
            revised.append(np.asarray(passes.revised.sum((0, 2, 3))) / config.image_length)
        codes.append(np.asarray(found))
    return np.concatenate(codes), float(np.concatenate(revised).mean())


def mean_orders(model, name, truth) -> dict[str, np.ndarray]:
    """The mean place of each cell, 0 (first) to 1, if the order is not by chance."""
    if name == "random":
        return {}
    config, params = model.priors["progressive"]
    codes, errors = (x[:256].reshape(-1, config.image_length) for x in (truth.codes, truth.errors))
    names = [record["captions"][0] for people in truth.splits.values() for record in people][:256]
    text = model.tokenizer.encode(names, length=config.text_length - 1)

    @jax.jit
    def places(params, text, codes, errors):
        blind, _ = Prior(config).apply(
            {"params": params}, text, jnp.full_like(codes, config.codes), method="predict"
        )
        chance = jnp.take_along_axis(jax.nn.log_softmax(blind), codes[..., None], axis=-1)
        return ranks(order_scores(name, jax.random.key(0), -chance[..., 0], errors))

    mean = np.asarray(places(params, text, codes, errors.astype(np.float32))).mean(axis=0)
    return {name: mean.reshape(config.grid, config.grid) / (config.image_length - 1)}


def draw_orders(orders: dict[str, np.ndarray], out: Path) -> None:
    """One square for each order: dark cells come first."""
    import matplotlib

    matplotlib.use("Agg")  # a file is wanted, not a window
    import matplotlib.pyplot as plt

    for name in ("centre", "raster"):
        rank = ranks(order_scores(name, jax.random.key(0), jnp.zeros((1, 64))))
        orders |= {name: np.asarray(rank).reshape(8, 8) / 63}
    figure, panels = plt.subplots(1, len(orders), figsize=(2 * len(orders), 2.3), squeeze=False)
    for panel, (name, order) in zip(panels[0], orders.items(), strict=True):
        panel.imshow(order, cmap="viridis", vmin=0, vmax=1)
        panel.set(title=name, xticks=[], yticks=[])
    figure.savefig(out, dpi=110, bbox_inches="tight")


def write(out: Path, rows: list[dict], pictures: int) -> None:
    """Writes the table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        lines.append(f"| {' | '.join(map(_short, row.values()))} |")
    out.write_text("\n".join([*lines, "", f"Nearest of {pictures} true pictures.", ""]))


def _short(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # or emoji.py there would hide the package `emoji`
    show_log_lines()
    keep_memory()
    keep_programs()
    chosen = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[Draw, tyro.conf.subcommand("draw", prefix_name=False)],
        description=__doc__,
    )
    (train if isinstance(chosen, Train) else draw)(chosen)
