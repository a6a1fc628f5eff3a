"""The scripts under experiments/: their command line, and all stages in turn.

A workdir holds one folder for each stage and, once trained, `model`, the folder that
`dalle_jax.load` opens. Source: ours.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Union, runtime_checkable

import tyro

from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import CLIP_FOLDER, CONFIG, copy_other_priors, replace_folder
from dalle_jax.image.sheet import contact_sheet, save_png
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.models.codec import TITLES, CodecConfig
from dalle_jax.parallel.processes import ProcessConfig, is_leader, join, leader_first
from dalle_jax.terminal import be_quiet, complaints, show_log_lines
from dalle_jax.text.bpe import SMALLEST_VOCABULARY, TextError
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.progressive_stage import progressive_run
from dalle_jax.train.trainers import Data, train_clip, train_codec, train_prior
from dalle_jax.train.vqgan_stage import VQGANRun

log = logging.getLogger(__name__)

Codec = Annotated[
    str,
    tyro.conf.arg(
        help="What makes codes of images: dvae or vqgan, that of the workdir; or the folder of "
        "a model, such as one that was imported, or the name of a shipped one."
    ),
]


@runtime_checkable
class DataOptions(Protocol):
    """A frozen dataclass of command-line options that say which data to open."""

    def open(self, px: int) -> Data:
        """Opens the data, for a model of images of side px."""
        ...


def main(
    name: str,
    *,
    data: type[DataOptions],
    dvae: DVAERun,
    vqgan: VQGANRun,
    prior: PriorRun,
    clip: ClipRun,
    args: Sequence[str] | None = None,
) -> None:
    """Runs an experiment script: reads its command line and trains the stages it names.

    Args:
      name: of the experiment and of its models.
      data: options of the data.
      dvae: settings of the dVAE's run, unless the command line says otherwise.
      vqgan: settings of the VQ-GAN's run, likewise.
      prior: settings of the prior's run, likewise; those of the progressive one are the same.
      clip: settings of the CLIP's run, likewise.
      args: the command line; None for the process's own.
    Raises:
      SystemExit: 2 with one sentence if something given cannot be used.
    """
    commands = (
        _command("dvae", "Train the dVAE.", data, {"dvae": dvae}),
        _command("vqgan", "Train the VQ-GAN, in place of the dVAE.", data, {"vqgan": vqgan}),
        _command("prior", "Train the prior on codes of images.", data, {"prior": prior}),
        _command(
            "progressive",
            "Train the progressive prior on codes of images.",
            data,
            {"progressive": progressive_run(prior)},
        ),
        _command("clip", "Train the CLIP that ranks images.", data, {"clip": clip}),
        _command(
            "all",
            "Train dVAE or VQ-GAN, prior and CLIP in turn.",
            data,
            {"dvae": dvae, "vqgan": vqgan, "prior": prior, "clip": clip},
        ),
    )
    show_log_lines()
    reuse_freed_memory()
    enable_compilation_cache()
    with complaints(f"{name}.py"):
        options = tyro.cli(Union[commands], prog=f"{name}.py", args=args)  # noqa: UP007
        join(options.processes)
        if not is_leader():
            be_quiet()
        _run(name, options)


def _command(command: str, doc: str, data: type, runs: dict[str, Any]):
    """A subcommand: its options are those of the data and of each run."""
    here = "Folder of the experiment: checkpoints, metrics, sheets and the trained model."
    fields = [
        ("workdir", Annotated[Path, tyro.conf.arg(help=here)]),
        ("data", Annotated[data, tyro.conf.arg(name="")]),
        ("processes", ProcessConfig, dataclasses.field(default_factory=ProcessConfig)),
    ]
    if set(runs) - {"dvae", "vqgan"}:
        fields.append(("codec", Codec, dataclasses.field(default="dvae")))
    for stage, run in runs.items():
        # One stage alone needs no prefix before its options.
        prefix = stage if len(runs) > 1 else ""
        kind = Annotated[type(run), tyro.conf.arg(name=prefix)]
        fields.append((stage, kind, dataclasses.field(default=run)))
    options = dataclasses.make_dataclass(command.title(), fields, frozen=True, kw_only=True)
    options.__doc__ = doc
    return Annotated[options, tyro.conf.subcommand(command, prefix_name=False)]


def _run(name: str, options: Any) -> None:
    codecs = {stage: getattr(options, stage, None) for stage in TITLES}
    wanted = getattr(options, "codec", None)  # one of two in `all`
    codecs = {stage: run for stage, run in codecs.items() if run and wanted in (stage, None)}
    clip = getattr(options, "clip", None)
    priors = {stage: getattr(options, stage, None) for stage in ("prior", "progressive")}
    priors = {stage: run for stage, run in priors.items() if run is not None}
    workdir: Path = options.workdir
    for stage, run in (*priors.items(), ("clip", clip)):
        _check_vocabulary(stage, run)
    for stage, codec in codecs.items():
        for prior in priors.values():
            _check_fit(prior, px=codec.px, codec=codec.model, title=TITLES[stage])
        data = _opened(options.data, codec.px)
        train_codec(codec, data, name=name, workdir=workdir / stage)
        log.info("the %s is in %s", TITLES[stage], workdir / stage / "model")
    for stage, prior in priors.items():
        codec_model = _codec_model(options)
        title = TITLES[codec_model.kind]
        _check_fit(prior, px=codec_model.px, codec=codec_model.codec, title=title)
        data = _opened(options.data, codec_model.px)
        model = train_prior(prior, data, codec_model, workdir=workdir / stage)
        _save(model, workdir)
        log.info("the model is in %s", workdir / "model")
        if is_leader() and prior.loop.sheet_every is not None:
            model = Model.load(workdir / "model")  # on one device
            sheet = workdir / "sheet.png"
            save_png(sheet, contact_sheet(model.generate(data.captions, n=4), data.captions))
            log.info("its samples are in %s", sheet)
    if clip is not None:
        codec_model = _codec_model(options) if clip.reconstructions else None
        data = _opened(options.data, clip.model.px)
        train_clip(clip, data, codec_model, name=name, workdir=workdir / clip.folder)
        log.info("the CLIP is in %s", workdir / clip.folder / "model")
        if is_leader() and clip.folder == CLIP_FOLDER and (workdir / "model" / CONFIG).is_file():
            with replace_folder(workdir / "model") as new:
                shutil.copytree(workdir / "model", new, dirs_exist_ok=True)
                _add_clip(workdir, new)


def _codec_model(options: Any) -> Model:
    """The model whose codec makes codes."""
    ours = options.codec in ("dvae", "vqgan")
    return Model.load(options.workdir / options.codec / "model" if ours else options.codec)


def _save(model: Model, workdir: Path) -> None:
    """Writes the model folder, with what the workdir has of CLIP and of other priors."""
    if not is_leader():
        model.write(None)
        return
    with replace_folder(workdir / "model") as new:
        model.write(new)
        if (workdir / "model" / CONFIG).is_file():
            copy_other_priors(workdir / "model", new)
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
