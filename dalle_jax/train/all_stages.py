"""All stages of a model in turn: a codec, priors and a CLIP, and the model folder they make.

A workdir holds one folder for each stage and, once trained, `model`, the folder that
`dalle_jax.load` opens. Source: ours.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import (
    CLIP_FOLDER,
    CONFIG,
    copy_other_priors,
    find_folder,
    replace_folder,
)
from dalle_jax.image.sheet import contact_sheet, save_png
from dalle_jax.models.codec import TITLES, CodecConfig
from dalle_jax.parallel.processes import is_leader, leader_first
from dalle_jax.text.bpe import SMALLEST_VOCABULARY, TextError
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.data_options import DataOptions
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.trainers import Data, train_clip, train_codec, train_prior
from dalle_jax.train.vqgan_stage import VQGANRun

log = logging.getLogger(__name__)

PRIOR_STAGES = ("prior", "progressive")


def train_stages(
    name: str,
    *,
    data: DataOptions,
    workdir: Path,
    codecs: Mapping[str, DVAERun | VQGANRun],
    priors: Mapping[str, PriorRun],
    clip: ClipRun | None,
    codec: str = "dvae",
    continued: bool = False,
    keep_tokenizer: bool = False,
) -> None:
    """Trains or resumes stages, each in a folder of its name, and writes the model folder.

    Args:
      name: of the models.
      data: what to train on.
      workdir: of all stages.
      codecs: runs of codecs, by the names of their stages.
      priors: runs of priors, likewise.
      clip: run of the CLIP; None for none.
      codec: what makes codes for priors and CLIP: a stage of the workdir, or a model by its
        folder or name.
      continued: whether priors go on from those of that model, with its tokenizer.
      keep_tokenizer: whether new priors have its tokenizer too, and join its other priors.
    Raises:
      UserError: if the runs do not fit each other, before any of them begins.
    """
    for stage, run in (*priors.items(), ("clip", clip)):
        _check_vocabulary(stage, run)
    for stage, run in codecs.items():
        for prior in priors.values():
            _check_fit(prior, px=run.px, codec=run.model, title=TITLES[stage])
        train_codec(run, _opened(data, run.px), name=name, workdir=workdir / stage)
        log.info("the %s is in %s", TITLES[stage], workdir / stage / "model")
    for stage, prior in priors.items():
        codec_model = open_codec(codec, workdir)
        title = TITLES[codec_model.kind]
        _check_fit(prior, px=codec_model.px, codec=codec_model.codec, title=title)
        if continued:
            _check_continued(stage, prior, codec_model)
        if keep_tokenizer:
            _check_tokenizer(codec_model)
        opened = _opened(data, codec_model.px)
        codec_model.name = name  # that of the model to come, whosever codec it is
        kept = {"continued": continued, "keep_tokenizer": keep_tokenizer}
        model = train_prior(prior, opened, codec_model, workdir=workdir / stage, **kept)
        _save(model, workdir, joins=[find_folder(codec)] if keep_tokenizer else [])
        log.info("the model is in %s", workdir / "model")
        if is_leader() and prior.loop.sheet_every is not None:
            model = Model.load(workdir / "model")  # on one device
            sheet = workdir / "sheet.png"
            save_png(sheet, contact_sheet(model.generate(opened.captions, n=4), opened.captions))
            log.info("its samples are in %s", sheet)
    if clip is not None:
        codec_model = open_codec(codec, workdir) if clip.reconstructions else None
        opened = _opened(data, clip.model.px)
        train_clip(clip, opened, codec_model, name=name, workdir=workdir / clip.folder)
        log.info("the CLIP is in %s", workdir / clip.folder / "model")
        if is_leader() and clip.folder == CLIP_FOLDER and (workdir / "model" / CONFIG).is_file():
            with replace_folder(workdir / "model") as new:
                shutil.copytree(workdir / "model", new, dirs_exist_ok=True)
                _add_clip(workdir, new)


def open_codec(codec: str, workdir: Path) -> Model:
    """The model whose codec makes codes: of a stage of the workdir, or by its folder or name."""
    return Model.load(workdir / codec / "model" if codec in ("dvae", "vqgan") else codec)


def _save(model: Model, workdir: Path, joins: Iterable[Path]) -> None:
    """Writes the model folder, with the workdir's CLIP, and its and other models' other priors."""
    if not is_leader():
        model.write(None)
        return
    with replace_folder(workdir / "model") as new:
        model.write(new)
        for old in (workdir / "model", *joins):
            if (old / CONFIG).is_file():
                copy_other_priors(old, new)
        _add_clip(workdir, new)


def _add_clip(workdir: Path, folder: Path) -> None:
    clip = workdir / CLIP_FOLDER / "model"
    if (clip / CONFIG).is_file():
        shutil.rmtree(folder / CLIP_FOLDER, ignore_errors=True)
        shutil.copytree(clip, folder / CLIP_FOLDER)


def _check_fit(prior: PriorRun, *, px: int, codec: CodecConfig, title: str) -> None:
    for option, got, wanted in (
        ("grid", prior.model.grid, px // codec.factor),
        ("codes", prior.model.codes, codec.codes),
    ):
        if got != wanted:
            raise UserError(
                f"the prior's model.{option} is {got}, but the {title} makes {wanted}; "
                f"give the prior --model.{option} {wanted} (--prior.model.{option} with `all`)"
            )


def _check_continued(stage: str, prior: PriorRun, model: Model) -> None:
    if stage not in model.priors:
        raise UserError(
            f"--continued wants to begin with a {stage} prior, but the model {model.name!r} has "
            f"{' and '.join(model.priors) or 'none'}; name another with --codec, or leave it out"
        )
    there = model.priors[stage][0]
    if there != prior.model:
        differing = [
            f"{name} {value} (there {getattr(there, name)})"
            for name, value in vars(prior.model).items()
            if value != getattr(there, name)
        ]
        raise UserError(
            f"--continued wants the sizes of the prior of {model.name!r}, but --model has "
            f"{', '.join(differing)}"
        )


def _check_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        raise UserError(
            f"--keep-tokenizer wants the tokenizer of {model.name!r}, but that model has no prior; "
            "name another with --codec, or leave it out"
        )


def _check_vocabulary(stage: str, run: Any) -> None:
    """Refuses before the first stage what would end the run at a later one."""
    if run is not None and run.model.text_vocabulary < SMALLEST_VOCABULARY:
        raise TextError(
            f"{stage}: model.text_vocabulary is {run.model.text_vocabulary}, but must be at least "
            f"{SMALLEST_VOCABULARY}, so that every caption can be spelled"
        )


def _opened(options: DataOptions, px: int) -> Data:
    with leader_first("data"):
        return options.open(px)
