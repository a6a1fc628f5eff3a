"""What the order of filling is worth: progressive priors that differ in nothing else, on people.

    python experiments/orders.py train --workdir runs/orders       # every prior; goes on if stopped
    python experiments/orders.py draw --workdir runs/orders --out orders.md

In the world of `people.py` a caption has one true image, so a drawing is right if no other of
the true images, training's and held-out ones alike, is nearer to it. The model's autoregressive
prior is measured too. `draw` writes a table of all priors, orders of sampling, numbers of stages,
revision and guidance, and an image of the mean orders of training beside it.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from people import PeopleOptions, prior
from recipes import nearest, run_command

import dalle_jax
from dalle_jax.data.emoji import PeopleSource
from dalle_jax.evaluate.distances import kernel_distance
from dalle_jax.evaluate.features import efficientnet_network
from dalle_jax.generate.code_sampler import sample_codes
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image import pixels
from dalle_jax.models.progressive_prior import ProgressivePrior
from dalle_jax.train.cell_orders import order_ranks, order_scores
from dalle_jax.train.log import read_metrics
from dalle_jax.train.progressive_stage import progressive_run
from dalle_jax.train.trainers import train_prior

ORDERS = ("dynamic", "certain", "uncertain", "random")
SAMPLING = ("random", "dynamic", "confidence")
STAGES, REVISE, GUIDANCE = (4, 8, 16), (0, 1), (1.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the priors one after the other."""

    workdir: Path
    """Where they go, a folder each."""
    model: str = "people"
    """Shipped model, or a model folder: its codec and autoregressive prior."""
    steps: int = 3_000
    """Updates of each."""
    only: tuple[str, ...] = ORDERS
    """Which ones, to share the work among processes."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draw with all priors that have been trained, and write the table."""

    workdir: Path
    """Where they are."""
    out: Path
    """Markdown file of the table; the orders go beside it, as PNG."""
    model: str = "people"
    """As for `train`."""
    only: tuple[str, ...] = ORDERS
    """Which priors, beside the autoregressive one."""
    stages: tuple[int, ...] = STAGES
    """Numbers of stages."""
    images: int = 70
    """Captions of training, and as many that were held out."""
    seed: int = 0
    """Of the drawings."""
    temperature: float = 1.0
    """Of the drawings."""


def train(options: Train) -> None:
    """Trains each prior on the same images, in the same order, for as many updates."""
    tokens = dalle_jax.load(options.model)
    data = PeopleOptions().open(tokens.px)
    start = prior()
    loop = dataclasses.replace(start.loop, steps=options.steps)
    for order in options.only:
        run = progressive_run(start, loop=loop, order=order, optimizer="muon")
        folder = options.workdir / order
        train_prior(run, data, tokens, workdir=folder).save(folder / "model")


def draw(options: Draw) -> None:
    """Draws everything and writes the table."""
    start = dalle_jax.load(options.model)
    truth = Truth(start, options)
    rows, orders = [], {}

    def measure(name, model, part, mended, **way):
        codes, revised = drawn(model, part, truth, options, **way)
        row = {"prior": name, "order": None, "stages": None, "revise": None} | way
        row |= truth.compare(model.decode(codes)) | revised | mended
        rows.append(row)
        print(json.dumps(row), flush=True)

    unmended = dict.fromkeys(("repaired", "damaged"))
    for guidance in GUIDANCE:
        measure("autoregressive", start, "prior", unmended, guidance=guidance)
    for name in options.only:
        folder = options.workdir / name
        model = Model.load(folder / "model")
        measured = read_metrics(folder / "metrics.jsonl")[-1]
        mended = {k: measured[f"eval/{k}"] for k in unmended}
        orders |= mean_orders(model, name, truth)
        for order, stages, revise, guidance in itertools.product(
            SAMPLING, options.stages, REVISE, GUIDANCE
        ):
            way = {"order": order, "stages": stages, "revise": revise, "guidance": guidance}
            measure(name, model, "progressive", mended, **way)
    write(options.out, rows, len(truth.all))
    draw_orders(orders, options.out.with_suffix(".png"))


class Truth:
    """The true images: those to be drawn, half of them held out, and all others."""

    def __init__(self, codec, options):
        rng = np.random.default_rng(options.seed)
        self.splits = {
            split: PeopleSource(split, px=codec.px) for split in ("train", "heldout_cell")
        }
        chosen = {
            split: rng.permutation(len(people))[: options.images].tolist()
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
        self.codes, self.errors = codec.codes_and_errors(images)
        self.all = codec.decode(self.codes)  # what the codes can draw at best
        self._network = efficientnet_network()
        self._features = self._network(self.all[self.own])[0]

    def compare(self, images) -> dict[str, float]:
        """Shares that are right, and how far off they are."""
        found = nearest(*(x.reshape(len(x), -1).astype(np.float64) for x in (images, self.all)))
        right, tone = found == self.own, self.tones[found] == self.tones[self.own]
        decibels, _ = pixels.decibels(self.all[self.own], images)
        kid = kernel_distance(self._network(images)[0], self._features)
        return {
            "right, seen": float(right[self.seen].mean()),
            "right, held out": float(right[~self.seen].mean()),
            "tone right": float(tone.mean()),
            "decibels": float(np.mean(decibels)),
            "KID x 1000": 1000 * float(kid),
        }


def drawn(model, part, truth, options, **way):
    """Codes for each caption, and how many filled cells changed on the way, and how rightly."""
    config, params = model.priors[part]
    own = truth.codes[truth.own]
    codes = np.empty_like(own)
    sampling = SamplingConfig(temperature=options.temperature, **way)
    counts = np.zeros(3)
    request = {"n": 1, "seed": options.seed, "sampling": sampling}
    for some in sample_codes(config, params, model.tokenizer, truth.captions, **request):
        passes = some.passes[:, :, 0]
        codes[some.prompts] = passes[-1]
        before, after, true = passes[:-1], passes[1:], own[some.prompts]
        changed = (before != after) & (before < some.empty_code)
        ways = (changed, changed & (after == true), changed & (before == true))
        counts += [marks.sum() for marks in ways]
    revised, *rightly = counts.tolist()
    shares = (share / revised if revised else None for share in rightly)
    return codes, {"revised": revised / codes.size} | dict(
        zip(("to the true code", "from it"), shares, strict=True)
    )


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
        prior = ProgressivePrior(config).bind({"params": params})
        every = jnp.arange(config.image_length)[None]
        blind = prior.predict(prior.prefill(text), every, count=config.text_length)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(blind), codes[..., None], axis=-1)
        scores = {"difficulty": -log_p[..., 0], "errors": errors}
        return order_ranks(order_scores(name, jax.random.key(0), codes.shape, **scores))

    mean = np.asarray(places(params, text, codes, errors.astype(np.float32))).mean(axis=0)
    return {name: mean.reshape(config.grid, config.grid) / (config.image_length - 1)}


def draw_orders(orders: dict[str, np.ndarray], out: Path) -> None:
    """One square for each order: dark cells come first."""
    import matplotlib

    matplotlib.use("Agg")  # a file is wanted, not a window
    import matplotlib.pyplot as plt

    for name in ("centre", "raster"):
        rank = order_ranks(order_scores(name, jax.random.key(0), (1, 64)))
        orders |= {name: np.asarray(rank).reshape(8, 8) / 63}
    figure, panels = plt.subplots(1, len(orders), figsize=(2 * len(orders), 2.3), squeeze=False)
    for panel, (name, order) in zip(panels[0], orders.items(), strict=True):
        panel.imshow(order, cmap="viridis", vmin=0, vmax=1)
        panel.set(title=name, xticks=[], yticks=[])
    figure.savefig(out, dpi=110, bbox_inches="tight")


def write(out: Path, rows: list[dict], images: int) -> None:
    """Writes the table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        lines.append(f"| {' | '.join(map(_short, row.values()))} |")
    out.write_text("\n".join([*lines, "", f"Nearest of {images} true images.", ""]))


def _short(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_command({Train: train, Draw: draw}, __doc__)
