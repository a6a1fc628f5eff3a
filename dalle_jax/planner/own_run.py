"""A run on someone's own images: what it will do and take, found before the first update.

Source: ours.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dalle_jax import atomic
from dalle_jax.data.batches import one_epoch
from dalle_jax.data.record import DataSource
from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.image.pixels import ImageError, decibels, decode, read_size
from dalle_jax.image.sheet import save_png
from dalle_jax.planner.forecast import StageForecast, forecast_stage, peak_memory
from dalle_jax.planner.recipe import Recipe, choose_recipe, with_text_length
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train.all_stages import train_stages
from dalle_jax.train.codec_stage import reconstruction_sheet
from dalle_jax.train.data_options import ContinuedOptions, DataOptions
from dalle_jax.train.lock import locked
from dalle_jax.train.log import read_metrics
from dalle_jax.train.trainers import with_tokenizer

log = logging.getLogger(__name__)

PLAN, RECONSTRUCTIONS = "plan.json", "reconstructions.png"
SAMPLED = 256  # records that are looked at to choose sizes
OBLONG = 1.5  # long side over short side from which an image is called so
LONGEST = 512  # tokens of a caption that are counted
OVERFIT = 1.03  # held-out loss over its lowest from which it is said to have risen
LEAST_STEPS = 200  # of a stage, however short the time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    recipe: Recipe
    images: int
    """To train on."""
    held_out: int
    side: int
    """Short side of the images (the long one if they are padded), in pixels, the median."""
    oblong: float
    """Share of the images that lose a third and more when their middle square is cut out."""
    cut: float
    """Share of the captions that are longer than what the prior reads."""
    stages: dict[str, StageForecast]
    psnr: float | None
    """Of reconstructions of held-out images by a codec that is kept, in dB; None for a new one."""
    memory: int
    """Most bytes in use while the updates were timed."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        return {name: self.stages[name].seconds(run) for name, run in self.recipe.stages()}

    @property
    def disk(self) -> int:
        """Bytes that the workdir needs at most."""
        return sum(self.stages[name].disk_bytes(run) for name, run in self.recipe.stages())


def make_plan(
    options: DataOptions,
    *,
    workdir: Path,
    model: Model | None = None,
    px: int | None = None,
    clip: bool = True,
    minutes: float | None = None,
) -> Plan:
    """Looks at the images, chooses sizes, and times a few updates of each stage.

    The plan is kept in the workdir. A later call with the same arguments and images reads it, so
    that a run that goes on has the lengths it began with.

    Args:
      options: the images.
      workdir: of the run; the tokenizer is learned there.
      model: goes on training, with its codec and tokenizer; None to begin from nothing.
      px: side of the new model's images; None to choose it.
      clip: whether to train a CLIP, if there are images enough.
      minutes: that the run may take at most; None for any number.
    Raises:
      UserError: if the images cannot be used, or an option does not fit.
    """
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes is {minutes}, but has to be more than 0")
    data = options.open(px or 0)
    images, held_out = len(data.train), len(data.validation)
    side, oblong = _shapes(data.train)
    recipe = choose_recipe(images, side, px=px, clip=clip, model=model)
    prior = recipe.prior_stage
    with locked(workdir):
        if model is None:
            run, tokenizer = with_tokenizer(recipe.prior, data, workdir / prior)
            tokens = _token_counts(data.train, tokenizer)
            recipe = with_text_length(recipe, int(np.quantile(tokens, 0.95)))
            size = run.model.text_vocabulary
        else:
            tokens = _token_counts(data.train, model.tokenizer)
            size = recipe.prior.model.text_vocabulary
        made_of = {
            "images": [images, held_out, side],
            "options": {"px": px, "clip": clip, "minutes": minutes},
            "model": model and model.fingerprints,
        }
        kept = _kept(workdir / PLAN, made_of)
        if kept is None:
            kept = {"made_of": made_of} | _timed(recipe, held_out, size, minutes)
            kept["psnr"] = model and _reconstructed(data.validation, model, workdir)
            atomic.write(workdir / PLAN, json.dumps(kept, indent=2) + "\n")
    recipe = recipe.with_steps(kept["steps"])
    return Plan(
        recipe=recipe,
        images=images,
        held_out=held_out,
        side=side,
        oblong=oblong,
        cut=float(np.mean(tokens > recipe.prior.model.text_length - 1)),
        stages={name: StageForecast(**stage) for name, stage in kept["stages"].items()},
        psnr=kept["psnr"],
        memory=kept["memory"],
    )


def run_plan(
    plan: Plan, options: DataOptions, *, workdir: Path, codec: str, model: Model | None
) -> None:
    """Trains or resumes all stages of a plan, and writes the folder `model` below the workdir.

    Args:
      plan: from `make_plan`.
      options: the images.
      workdir: of the run; its name is that of the model.
      codec: "vqgan", or name or folder of the model that goes on.
      model: that model, opened; None for none.
    """
    runs = dict(plan.recipe.stages())
    prior = plan.recipe.prior_stage
    train_stages(
        workdir.resolve().name,
        data=options if model is None else ContinuedOptions(images=options, model=model),
        workdir=workdir,
        codecs={"vqgan": runs["vqgan"]} if "vqgan" in runs else {},
        priors={prior: runs[prior]},
        clip=plan.recipe.clip,
        codec=codec,
        continued=model is not None,
    )


def overfit(metrics: Path) -> str:
    """Says when a prior was best on held-out images, if that was well before its end.

    Args:
      metrics: file of its run.
    Returns:
      A sentence, or "" for none.
    """
    losses = [(e["eval/loss"], e["step"]) for e in read_metrics(metrics) if e.get("eval/loss")]
    if not losses or losses[-1][0] <= OVERFIT * min(losses)[0]:
        return ""
    best, step = min(losses)
    return (
        f"The loss on held-out images was lowest, {best:.3g}, after {step:,} updates, and is now "
        f"{losses[-1][0]:.3g}: since then the prior has learned images by heart. For new captions "
        "fewer --minutes in a new workdir, or more images, are better."
    )


def _timed(recipe: Recipe, held_out: int, vocabulary: int, minutes: float | None) -> dict[str, Any]:
    stages = {}
    for name, run in recipe.stages():
        log.info("timing a few updates of %s", name)
        if name != "vqgan":  # of the size that the captions give, as it will be in the run
            sizes = dataclasses.replace(run.model, text_vocabulary=vocabulary)
            run = dataclasses.replace(run, model=sizes)
        stages[name] = forecast_stage(run, held_out=held_out)
    if minutes is None:
        steps = {name: run.loop.steps for name, run in recipe.stages()}
    else:
        steps = steps_in(60 * minutes, recipe, stages)
    return {
        "steps": steps,
        "memory": peak_memory(),
        "stages": {name: dataclasses.asdict(stage) for name, stage in stages.items()},
    }


def steps_in(seconds: float, recipe: Recipe, stages: dict[str, StageForecast]) -> dict[str, int]:
    """Steps of each stage that fit into a time: a few, and the same share of the recipe's others.

    Raises:
      UserError: if the time is too short for a few.
    """
    runs = dict(recipe.stages())
    fixed = sum(stages[name].fixed_seconds(run) for name, run in runs.items())
    least = fixed + LEAST_STEPS * sum(stage.update_s for stage in stages.values())
    if seconds < least:
        raise UserError(
            f"--minutes is {seconds / 60:.3g}, but compiling, measuring and {LEAST_STEPS} updates "
            f"of each stage take {math.ceil(least / 60)} on this machine; give at least that"
        )
    others = {name: run.loop.steps - LEAST_STEPS for name, run in runs.items()}
    share = (seconds - least) / sum(stages[name].update_s * n for name, n in others.items())
    share = min(share, 1.0)
    return {name: LEAST_STEPS + int(share * n) for name, n in others.items()}


def _reconstructed(source: DataSource, model: Model, workdir: Path) -> float:
    """The PSNR of reconstructions by a codec; those of some images are drawn on a sheet."""
    images = next(one_epoch(source, batch_size=32, px=model.px))["image"]

    def reconstruct(images):
        return model.decode(model.encode(images))

    save_png(workdir / RECONSTRUCTIONS, reconstruction_sheet(images, reconstruct))
    return float(np.mean(decibels(images, reconstruct(images))[0]))


def _kept(path: Path, made_of: dict) -> dict | None:
    """An earlier plan, if it was made of the same."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept if kept.get("made_of") == json.loads(json.dumps(made_of)) else None


def _some(source: DataSource) -> Iterable[dict]:
    """Records from all over a source."""
    count = min(SAMPLED, len(source))
    return (source[i * len(source) // count] for i in range(count))


def _shapes(source: DataSource) -> tuple[int, float]:
    """The median of the sides that training sees, and the share of oblong images."""
    sides, oblong = [], []
    for record in _some(source):
        image, pad = record["image"], record.get("pad", False)
        try:
            size = decode(image).shape[:2] if isinstance(image, bytes) else read_size(image)
        except (ImageError, OSError):
            continue
        if size is not None:
            sides.append(max(size) if pad else min(size))
            oblong.append(not pad and max(size) > OBLONG * min(size))
    if not sides:
        raise UserError("none of the images can be read; `dalle-jax data check` says why")
    return int(np.median(sides)), float(np.mean(oblong))


def _token_counts(source: DataSource, tokenizer: Tokenizer) -> Int[np.ndarray, " captions"]:
    captions = [caption for record in _some(source) for caption in record["captions"]]
    ids = tokenizer.encode(captions, length=LONGEST)
    return (ids < tokenizer.vocabulary).sum(axis=1)
