"""What recipes of training are worth to small priors, one change at a time, on people.

    python experiments/recipes.py prepare --out runs/recipes.npz        # needs dalle_jax[emoji]
    python experiments/recipes.py measure --data runs/recipes.npz --out runs/ratios.json
    python experiments/recipes.py train --data runs/recipes.npz --out runs/recipes.jsonl \
        --equal-time runs/ratios.json
    python experiments/recipes.py table --lines runs/recipes.jsonl

In the world of `people.py` a caption has one true image, so a sample is right if no other true
image, as decoded from its codes, is nearer to it. A recipe differs from its base in one thing;
recipes that differ in numbers alone, and all seeds, train together in one program, which leaves the
device after the last update. Several processes can run `train` with one file and different
`--recipes`; what is in the file already is not trained again. What was measured: docs/recipes.md.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from people import PeopleOptions, prior
from recipe_programs import PROGRAMS, RECIPES, Program, Recipe

import dalle_jax
from dalle_jax import atomic
from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.image import pixels
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.terminal import show_log_lines
from dalle_jax.train.state import init_state
from dalle_jax.train.train_step import apply_gradients, count, update_ema

CUTS = 8  # an image's nats are the mean over so many orders and numbers of stages
MEASURES = ("nats, seen", "nats, held out", "right, seen", "right, held out")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode the images and captions once, into a file that `train` needs and nothing else."""

    out: Path
    """The file, .npz."""
    model: str = "people"
    """Shipped model, or a model folder: its codec and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure the processor time of an update of each program, in that of the base."""

    data: Path
    """From `prepare`."""
    out: Path
    """JSON file of the ratios."""
    updates: int = 10
    """Updates in a row."""
    rounds: int = 5
    """How often each program has its turn; the median counts."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train recipes, sample with them, and add a line of JSON for each to a file."""

    data: Path
    """From `prepare`."""
    out: Path
    """File of JSON lines; recipes that have one are left out."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Which ones."""
    updates: int = 3_000
    """Of the base; of all others too, without `equal_time`."""
    equal_time: Path | None = None
    """From `measure`: as many updates as take the base's processor time."""
    seeds: int = 3
    """Runs of each recipe: other first weights, orders and batches, the same for all recipes."""
    images: int = 70
    """Captions of training to sample, and as many that were held out, of which there are 70."""
    model: str = "people"
    """As for `prepare`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print the table of what `train` has written."""

    lines: Path
    """Its file."""


def prepare(options: Prepare) -> None:
    """Writes codes, tokens and captions, those of training first."""
    model = dalle_jax.load(options.model)
    images, arrays = people(model.px, model.tokenizer)
    codes, _ = model.codes_and_errors(images)
    save(options.out, codes=codes.reshape(len(codes), -1).astype(np.int32), **arrays)


def people(px: int, tokenizer) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The images, those of training first, and tokens and captions of all."""
    data = PeopleOptions().open(px)
    records = [part[i] for part in (data.train, data.validation) for i in range(len(part))]
    captions = [record["captions"][0] for record in records]
    slots = prior().model.text_length - 1
    return np.stack([pixels.decode(record["image"]) for record in records]), {
        "text": tokenizer.encode(captions, length=slots),
        "empty": tokenizer.encode([""], length=slots)[0],
        "captions": np.array(captions),
        "seen": np.arange(len(records)) < len(data.train),
    }


def training(program: Program, steps: int) -> Callable:
    """A function that trains recipes with several seeds, and gives parameters and their EMA.

    Its arguments: numbers, of each recipe; a key, the images of each update [steps, B] and which of
    them lose their captions, of each seed; text, codes and the empty caption.
    """
    run = program.run(steps)

    def train(numbers, key, shown, dropped, text, codes, empty):
        stage = program.stage(run, numbers)
        update = apply_gradients(stage, None, 1)
        update = update_ema(update, every=run.loop.ema_every, decay=run.loop.ema_decay)

        def step(state, images):
            shown, dropped = images
            caption = jnp.where(dropped[:, None], empty, text[shown])
            return count(update)(state, {"text": caption, "codes": codes[shown]})[0], None

        state, _ = jax.lax.scan(step, init_state(stage, key), (shown, dropped))
        return {"EMA": state.ema_params, "last": state.params}

    shared = (None,) * 3
    seeds = jax.vmap(train, in_axes=(None, 0, 0, 0, *shared))
    return jax.vmap(seeds, in_axes=(0, None, None, None, *shared))


def judging(program: Program, steps: int) -> Callable:
    """A function of numbers, parameters, text and codes [2, images, ...]: nats [2] and samples.

    It maps over recipes and seeds. Seen and held-out images stand apart; of each caption one
    image is sampled.
    """
    run = program.run(steps)

    def judge(numbers, params, text, codes):
        stage = program.stage(run, numbers)
        keys = jax.random.split(jax.random.key(0), CUTS)

        def nats(text, codes):
            return jax.lax.map(lambda key: stage.nats(params, text, codes, key), keys).mean()

        shape = (2 * text.shape[1], codes.shape[2])
        text_of_all = text.reshape(len(text[0]) * 2, -1)
        samples = sample(stage, params, text_of_all, shape, jax.random.key(1))
        return jnp.stack([nats(text[i], codes[i]) for i in range(2)]), samples

    seeds = jax.vmap(judge, in_axes=(None, 0, None, None))
    return jax.vmap(seeds, in_axes=(0, 0, None, None))


def sample(stage, params, text, shape, key):
    """Samples codes in the stages of a plan, each from all that came before."""
    key_plan, key_codes = jax.random.split(key)
    when, stages = stage.plan(key_plan, shape)

    def fill(codes, number):
        logits = stage.logits(params, text, codes, when)
        new = jax.random.categorical(jax.random.fold_in(key_codes, number), logits)
        return jnp.where(when == number, new, codes), None

    return jax.lax.scan(fill, jnp.zeros(shape, jnp.int32), jnp.arange(stages))[0]


def batches(seed: int, images: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of each update, epoch by epoch in a new order, and which lose their captions."""
    rng, run = np.random.default_rng(seed), prior()
    shown = epochs(rng, images, steps, run.batch_size)
    return shown, rng.random(shown.shape) < run.caption_dropout


def epochs(rng: np.random.Generator, images: int, steps: int, batch: int) -> np.ndarray:
    """The images of each update, epoch by epoch in a new order."""
    orders = [rng.permutation(images) for _ in range(-(-steps * batch // images))]
    return np.concatenate(orders)[: steps * batch].reshape(steps, batch).astype(np.int32)


def inputs(data, recipes: list[Recipe], steps: int, seeds: Sequence[int]) -> tuple:
    """Arguments of a program that trains recipes with several seeds."""
    numbers = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *(x.numbers for x in recipes))
    seen = int(data["seen"].sum())
    shown, dropped = zip(*(batches(seed, seen, steps) for seed in seeds), strict=True)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    arrays = (jnp.asarray(data[name]) for name in ("text", "codes", "empty"))
    return numbers, keys, jnp.stack(shown), jnp.stack(dropped), *arrays


def measure(options: Measure) -> None:
    """Measures the programs in turns, so that other work on the machine slows all of them."""
    data, steps, compiled = load(options.data), options.updates, {}
    for name, program in PROGRAMS.items():
        args = inputs(data, [Recipe(name)], steps, range(1))
        compiled[name] = program.lower(training(program, steps), *args).compile(), args
    seconds = {name: [] for name in compiled}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, (function, args) in compiled.items():
            start = time.process_time()
            jax.block_until_ready(function(*args))
            seconds[name] += [time.process_time() - start] * (turn > 0)
    base = np.array(seconds["progressive"])
    ratios = {name: float(np.median(some / base)) for name, some in seconds.items()}
    atomic.write(options.out, json.dumps(ratios, indent=1) + "\n")


def train(options: Train) -> None:
    """Trains the recipes, those of a program together, and judges them."""
    data, truth = load(options.data), Truth(options)
    ratios = json.loads(options.equal_time.read_text()) if options.equal_time else {}
    done = {line["recipe"] for line in read(options.out)} if options.out.exists() else set()
    for name, program in PROGRAMS.items():
        names = [x for x in options.recipes if RECIPES[x].program == name and x not in done]
        if not names:
            continue
        steps = round(options.updates / ratios.get(name, 1))
        args = inputs(data, [RECIPES[x] for x in names], steps, range(options.seeds))
        function = program.lower(training(program, steps), *args).compile()
        start = time.perf_counter()
        params = jax.block_until_ready(function(*args))
        seconds = (time.perf_counter() - start) / steps
        same = {
            "program": name,
            "updates": steps,
            "parameters": sum(x[0, 0].size for x in jax.tree.leaves(params["EMA"])),
            "seconds per update": seconds,
            "runs at once": len(names) * options.seeds,
            "device": jax.devices()[0].device_kind,
        }
        judge = program.lower(judging(program, steps), args[0], params["EMA"], *truth.inputs)
        judge = judge.compile()
        judged = {kind: judge(args[0], params[kind], *truth.inputs) for kind in params}
        for i, recipe in enumerate(names):
            found = {kind: truth.compare(*(x[i] for x in judged[kind])) for kind in judged}
            add(options.out, {"recipe": recipe} | same | found)


class Truth:
    """The images as decoded: those to be sampled, half of them held out, and others."""

    def __init__(self, options: Train):
        data, self.codec = load(options.data), dalle_jax.load(options.model)
        self.own = to_sample(data["seen"], options.images)
        self.inputs = tuple(jnp.asarray(data[name][self.own]) for name in ("text", "codes"))
        self.true = self.decode(data["codes"])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels of each image, in one row."""
        grid = prior().model.grid
        images = self.codec.decode(np.asarray(codes).reshape(-1, grid, grid))
        return images.reshape(len(images), -1).astype(np.float32)

    def compare(self, nats: np.ndarray, samples: np.ndarray) -> dict[str, list[float]]:
        """Nats a code and the share of right samples, of each seed, seen and held out."""
        found = {name: [] for name in MEASURES}
        for (seen, held_out), codes in zip(np.asarray(nats), samples, strict=True):
            right = share_right(self.decode(codes), self.true, self.own)
            for name, value in zip(MEASURES, (seen, held_out, *right), strict=True):
                found[name].append(float(value))
        return found


def to_sample(seen: np.ndarray, images: int) -> np.ndarray:
    """Images whose captions are sampled [2, images]: seen in training, and held out."""
    rng = np.random.default_rng(0)
    halves = [np.flatnonzero(half) for half in (seen, ~seen)]
    return np.stack([rng.permutation(half)[:images] for half in halves])


def share_right(sampled: np.ndarray, true: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Share of the samples whose nearest true image is their own, seen and held out.

    Pixels are float32 [images, pixels]; `own` is what `to_sample` gives.
    """
    return (nearest(sampled, true).reshape(own.shape) == own).mean(axis=1)


def nearest(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Index of the true image [N, pixels] that is nearest to each image [B, pixels]."""
    apart = (true**2).sum(1)[None] - 2 * images @ true.T  # and the square of the image for all
    return apart.argmin(axis=1)


def save(path: Path, **arrays: np.ndarray) -> None:
    """Writes what `load` reads."""
    with atomic.replaced(path) as file, open(file, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def load(path: Path) -> dict[str, np.ndarray]:
    """Arrays of `prepare`."""
    with np.load(path) as file:
        return dict(file)


def add(path: Path, line: dict) -> None:
    """Prints a line and adds it to a file."""
    print(json.dumps(line), flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """Lines of `train`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(options: Table) -> None:
    """Prints a row for each recipe, in the order of their list: means, and each seed."""
    lines = {line["recipe"]: line for line in read(options.lines)}
    head = ("recipe", "updates", "parameters", *MEASURES)
    print(f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", sep="\n")
    for recipe in RECIPES:
        for kind in ("last", "EMA") if recipe in ("base", "ar") else ("last",):
            if line := lines.get(recipe):
                name = recipe if kind == "last" else f"{recipe}, EMA"
                cells = [name, f"{line['updates']:,}", f"{line['parameters']:,}"]
                cells += [_seeds(line[kind][measure], measure) for measure in MEASURES]
                print(f"| {' | '.join(cells)} |")


def _seeds(values: list[float], measure: str) -> str:
    form = "{:.3f}" if measure.startswith("nats") else "{:.0%}"
    each = ", ".join(form.format(value) for value in values)
    return f"{form.format(np.mean(values))} ({each})"


def run_command(commands: dict[type, Callable], description: str) -> None:
    """Runs the command that the command line names; each has the name of its function."""
    sys.path.remove(str(Path(__file__).parent))  # or emoji.py there would hide the package `emoji`
    show_log_lines()
    reuse_freed_memory()
    enable_compilation_cache()
    parsers = [
        Annotated[options, tyro.conf.subcommand(function.__name__, prefix_name=False)]
        for options, function in commands.items()
    ]
    chosen = tyro.cli(Union[tuple(parsers)], description=description)  # noqa: UP007
    commands[type(chosen)](chosen)


if __name__ == "__main__":
    run_command({Prepare: prepare, Measure: measure, Train: train, Table: table}, __doc__)
