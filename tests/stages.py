"""A tiny run of each training stage, whose settings all take part, and the stage of a run."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from dalle_jax.data.shapes import ShapesSource
from dalle_jax.train import trainers
from dalle_jax.train.clip_stage import ClipRun, ClipStage
from dalle_jax.train.dvae_stage import DVAERun, DVAEStage
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun, PriorStage
from dalle_jax.train.progressive_stage import ProgressiveRun, ProgressiveStage
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

LOOP = LoopConfig(steps=12)
RATES = {"learning_rate": 0.1, "learning_rate_end": 0.01, "warmup_steps": 3, "weight_decay": 0.2}
CODEC = {"px": tiny.PX, "crop_px": 8, "batch_size": 4, "loop": LOOP, "grad_clip_norm": 2.0}
PRIOR = {"batch_size": 4, "loop": LOOP, "grad_clip_norm": 2.0, "max_second_moment": 0.05}
PRIOR |= {"plateau_steps": 2, "precision": "float32", "scan_layers": False, "remat": False}
PRIOR |= {"caption_dropout": 0.1, "encode_once": True}
SIZES = tiny.parts()["prior"]
PARTIAL = {"model": dataclasses.replace(tiny.progressive_parts()["progressive"], depth=3)}

RUNS = {
    "dvae": DVAERun(
        model=tiny.DVAE_CONFIG,
        temperature_steps=8,
        kl_steps=8,
        rare_code_weight=10.0,
        min_log_scale=-2.0,
        learning_rate_steps=6,
        **RATES,
        **CODEC,
    ),
    "vqgan": VQGANRun(
        model=dataclasses.replace(tiny.VQGAN_CONFIG, multipliers=(1, 2)),
        adversarial_weight=0.8,
        discriminator_width=4,
        discriminator_layers=1,
        **RATES,
        **CODEC,
    ),
    "prior": PriorRun(model=SIZES, **RATES, **PRIOR),
    "progressive": ProgressiveRun(**RATES, **PRIOR, **PARTIAL),
    "clip": ClipRun(
        model=tiny.clip_parts()["config"],
        loop=LOOP,
        batch_size=4,
        shift=1,
        reconstructions=True,
        precision="float32",
        **RATES,
    ),
}


def changed(run, field, value):
    """The run with one field changed, of itself or (with a dot) of what stands in a field."""
    head, _, rest = field.partition(".")
    value = changed(getattr(run, head), rest, value) if rest else value
    return dataclasses.replace(run, **{head: value})


def images(count=32):
    return np.random.default_rng(0).integers(0, 256, (count, tiny.PX, tiny.PX, 3), np.uint8)


def stage(run):
    """The stage of a run."""
    if isinstance(run, ClipRun):
        return ClipStage(run, validation={})
    if isinstance(run, DVAERun | VQGANRun):
        kind = DVAEStage if isinstance(run, DVAERun) else VQGANStage
        return kind(run, init_images=images, validation=lambda: iter(()))
    return (ProgressiveStage if isinstance(run, ProgressiveRun) else PriorStage)(
        run,
        codec_model=codec(),
        tokenizer=tiny.tokenizer(),
        validation=lambda: iter(()),
        captions=["red apple"],
    )


def codec():
    return tiny.model(prior=None, prior_params=None, tokenizer=None)


def batch(run):
    """Four examples of what the stage learns from."""
    rng = np.random.default_rng(1)
    if isinstance(run, DVAERun | VQGANRun):
        return {"image": images(4)}
    slots = run.model.slots if isinstance(run, ClipRun) else run.model.text_length - 1
    text = rng.integers(0, run.model.text_vocabulary, (4, slots)).astype(np.int32)
    if isinstance(run, ClipRun):
        px = run.model.px
        return {"text": text, "image": rng.integers(0, 256, (4, px, px, 3), np.uint8)}
    G, K = run.model.grid, run.model.codes
    return {
        "text": text,
        "codes": rng.integers(0, K, (4, G, G)).astype(np.int32),
        "errors": rng.random((4, G, G), np.float32),
    }


class Nothing:
    """An iterator over batches that are never asked for."""

    def __next__(self):
        raise NotImplementedError

    def get_state(self):
        return {}

    set_state = __next__


class Reached(Exception):
    """Ends an experiment."""


def experiment_of(run, *, train_too=True):
    """Trains a stage as the scripts do, but for the data and the loop, which note what they got.

    Args:
      run: of the stage.
      train_too: whether to go on when the data is asked for.
    Returns:
      What `batches` and what `train` got, and the model (or CLIP) that was made of an average
      which is 1.003 everywhere; the weights in training are 2.
    """
    seen = SimpleNamespace()

    def batches(source, **options):
        seen.batches = {"source": known.get(id(source), source)} | options
        if not train_too:
            raise Reached
        return Nothing()

    def train(stage, iterator, **options):
        seen.train = {"stage": stage.name, "iterator": type(iterator).__name__} | options
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        average, params = (
            jax.tree.map(lambda x, value=value: np.full(x.shape, value, x.dtype), shapes)
            for value in (1.003, 2)
        )
        return SimpleNamespace(ema_params=average, params=params, step=run.loop.steps)

    train_set, validation = (ShapesSource(x, px=tiny.PX) for x in ("train", "validation"))
    data = trainers.Data(
        train=train_set, validation=validation, captions=["red apple"], attribution=""
    )
    known = {id(train_set): "images", id(validation): "validation images"}
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(Reached),
    ):
        workdir = Path(folder)
        patch.setattr(trainers, "batches", batches)
        patch.setattr(trainers, "train", train)
        patch.setattr(trainers, "cached_codes", lambda x, *_: f"codes of {known[id(x)]}")
        patch.setattr(
            trainers, "cached_reconstructions", lambda x, *_: f"reconstructed {known[id(x)]}"
        )
        patch.setattr(trainers, "ConcatSource", lambda x, y: f"{known[id(x)]}, {y}")
        patch.setattr(trainers, "run_tokenizer", lambda *_, **__: tiny.tokenizer())
        patch.setattr(trainers.Model, "save", lambda *_: None)
        patch.setattr(trainers.Clip, "save", lambda *_: None)
        if isinstance(run, ClipRun):
            seen.model = trainers.train_clip(run, data, codec(), name="tiny", workdir=workdir)
        elif isinstance(run, PriorRun):
            seen.model = trainers.train_prior(run, data, codec(), workdir=workdir)
        else:
            seen.model = trainers.train_codec(run, data, name="tiny", workdir=workdir)
    return seen
