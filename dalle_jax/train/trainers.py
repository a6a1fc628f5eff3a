"""Trains the stages of a model on captioned images: a codec, a prior, a CLIP.

Each works in a folder of its own: checkpoints, metrics.jsonl, sheets, and for a codec or a CLIP
`model`, the folder of what was trained. Source: ours.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dalle_jax.data.batches import batches, one_epoch
from dalle_jax.data.sources import ConcatSource, DataSource
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.parallel.mesh import gather_to_host
from dalle_jax.parallel.processes import is_leader, leader_first
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train import run_settings
from dalle_jax.train.clip_stage import ClipRun, ClipStage
from dalle_jax.train.dvae_stage import DVAERun, DVAEStage
from dalle_jax.train.encode import EncodedBatches, cached_codes, cached_reconstructions
from dalle_jax.train.loop import train
from dalle_jax.train.model_card import model_card, stage_summary
from dalle_jax.train.prior_stage import PriorRun, PriorStage
from dalle_jax.train.progressive_stage import ProgressiveRun, ProgressiveStage
from dalle_jax.train.run_tokenizer import run_tokenizer
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

log = logging.getLogger(__name__)

INIT_IMAGES = 1024  # images whose features a codebook is initialised from


@dataclass(frozen=True, kw_only=True)
class Data:
    """Opened images and captions, and what a model card says of them."""

    train: DataSource
    validation: DataSource
    captions: Sequence[str]
    """Sampled on the contact sheets."""
    attribution: str
    """Markdown for the model card: where the images are from and on which terms."""
    license: str = ""
    """Terms for weights trained on them; empty if their owner has not said."""


def train_codec(run: DVAERun | VQGANRun, data: Data, *, name: str, workdir: Path) -> Model:
    """Trains or resumes a dVAE or VQ-GAN, and writes the folder `model` below workdir."""
    stage = (VQGANStage if isinstance(run, VQGANRun) else DVAEStage)(
        run,
        init_images=lambda: _first_images(data.train, run.px),
        validation=lambda: one_epoch(data.validation, batch_size=64, px=run.px),
    )
    iterator = batches(
        data.train,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        px=run.px,
        crop="dvae",
        **_process_options(),
    )
    state = train(stage, iterator, **_train_options(run, workdir))
    model = Model(
        name=name,
        px=run.px,
        codec=run.model,
        codec_params=jax.device_get(gather_to_host(stage.network(state.ema_params))),
        card=_card(name, data, [stage_summary(stage.name, run, state.step, workdir)]),
        license=data.license,
    )
    with leader_first("codec"):  # the others may open it next
        if is_leader():
            model.save(workdir / "model")
    return model


def train_prior(
    run: PriorRun,
    data: Data,
    codec_model: Model,
    *,
    workdir: Path,
    continued: bool = False,
    keep_tokenizer: bool = False,
) -> Model:
    """Trains or resumes a prior of either kind; gives the complete model, not yet saved.

    The weights of the model stay sharded over the devices that trained them: of several processes
    all have to write it together.

    Args:
      run: the settings.
      data: for training and evaluation.
      codec_model: its codec makes codes of images.
      workdir: folder of this run alone.
      continued: begin with the prior of that model, which has the sizes of the run, and keep its
        tokenizer.
      keep_tokenizer: keep its tokenizer for a new prior too.
    """
    stage_class = ProgressiveStage if isinstance(run, ProgressiveRun) else PriorStage
    initial = init_from = None
    if continued:
        part = stage_class.name
        initial, init_from = codec_model.priors[part][1], codec_model.fingerprints[part]
    kept = codec_model.tokenizer if continued or keep_tokenizer else None
    run, tokenizer = with_tokenizer(run, data, workdir, kept)
    text = {"px": codec_model.px, "tokenizer": tokenizer, "text_length": run.model.text_length}
    validation = data.validation
    if run.loop.evaluate_every is not None:  # read again and again, so always encoded once
        validation = cached_codes(validation, codec_model, workdir / "codes" / "validation")
    stage = stage_class(
        run,
        codec_model=codec_model,
        tokenizer=tokenizer,
        validation=lambda: one_epoch(validation, batch_size=64, **text),
        captions=data.captions,
        initial=initial,
    )
    source = data.train
    if run.encode_once:
        source = cached_codes(source, codec_model, workdir / "codes" / "train")
    iterator = batches(
        source,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        crop="prior",
        bpe_dropout=run.bpe_dropout,
        caption_dropout=run.caption_dropout,
        **text,
        **_process_options(),
    )
    if not run.encode_once:
        iterator = EncodedBatches(iterator, codec_model)
    fingerprints = codec_model.fingerprints | {"tokenizer": tokenizer.fingerprint}
    options = _train_options(run, workdir, fingerprints)
    options["settings"]["init_from"] = init_from
    state = train(stage, iterator, **options)
    # with the lines that an entry goes on in
    codec_lines = re.findall(
        rf"^- {codec_model.kind}:.*(?:\n  .*)*", codec_model.card, re.MULTILINE
    )
    summary = stage_summary(stage.name, run, state.step, workdir)
    card = _card(codec_model.name, data, [*codec_lines, summary])
    return stage.to_model(state.ema_params, card=card, license=data.license)


def train_clip(
    run: ClipRun, data: Data, codec_model: Model | None, *, name: str, workdir: Path
) -> Clip:
    """Trains or resumes the CLIP, and writes the folder `model` below workdir.

    Args:
      run: the settings.
      data: for training and evaluation.
      codec_model: its codec reconstructs the images; None for none.
      name: of the experiment.
      workdir: folder of this run alone.
    """
    run, tokenizer = with_tokenizer(run, data, workdir)
    px = run.model.px
    text = {"tokenizer": tokenizer, "text_length": run.model.slots + 1}  # no end token in batches
    source, validation = data.train, {"": data.validation}
    fingerprints = {"tokenizer": tokenizer.fingerprint}
    if codec_model is not None:
        folder = workdir / "reconstructed"
        reconstructions = cached_reconstructions(source, codec_model, folder / "train")
        source = ConcatSource(source, reconstructions)
        if run.loop.evaluate_every is not None:
            validation["reconstructed_"] = cached_reconstructions(
                data.validation, codec_model, folder / "validation"
            )
        fingerprints |= codec_model.fingerprints
    stage = ClipStage(
        run,
        validation={
            prefix: partial(one_epoch, images, batch_size=64, px=px, **text)
            for prefix, images in validation.items()
        },
    )
    iterator = batches(
        source,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        px=px,
        crop="prior",  # not mirrored, since captions say left and right
        **text,
        **_process_options(),
    )
    state = train(stage, iterator, **_train_options(run, workdir, fingerprints))
    summary = stage_summary("clip", run, state.step, workdir)
    clip = Clip(
        name=name,
        config=run.model,
        params=jax.device_get(gather_to_host(state.ema_params)),
        tokenizer=tokenizer,
        card=_card(name, data, [summary], opener="dalle_jax.Clip.load"),
        license=data.license,
    )
    if is_leader():
        clip.save(workdir / "model")
    return clip


def _train_options(run: Any, workdir: Path, fingerprints: dict[str, str] | None = None) -> dict:
    settings = run_settings.settings(run)
    if fingerprints is not None:
        settings |= {"fingerprints": fingerprints}
    return {
        "config": run.loop,
        "workdir": workdir,
        "settings": settings,
        "defaults": run_settings.defaults(run),
        "may_change": run_settings.MAY_CHANGE,
    }


def _process_options() -> dict[str, int]:
    """Which part of every batch this process reads, and with how many threads."""
    part = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return part | {"threads": max(4, cores)}


def _first_images(source: DataSource, px: int):
    return next(one_epoch(source, batch_size=INIT_IMAGES, px=px))["image"]


def with_tokenizer(
    run: Any, data: Data, workdir: Path, kept: Tokenizer | None = None
) -> tuple[Any, Tokenizer]:
    """Gives the run's tokenizer, or the kept one, and the run with the size of its vocabulary."""
    wanted = run.model.text_vocabulary
    tokenizer = kept or run_tokenizer(data.train, vocabulary=wanted, folder=workdir)
    if tokenizer.vocabulary != wanted:
        log.info("the tokenizer has a vocabulary of %d, not %d", tokenizer.vocabulary, wanted)
        sizes = dataclasses.replace(run.model, text_vocabulary=tokenizer.vocabulary)
        run = dataclasses.replace(run, model=sizes)
    return run, tokenizer


def _card(name: str, data: Data, stages: Sequence[str], **options: str) -> str:
    return model_card(name, stages, attribution=data.attribution, license=data.license, **options)
