"""What the scripts under experiments/ share: their command line, and all stages in turn.

A workdir holds one folder for each stage (checkpoints, metrics.jsonl, sheets) and, once trained,
`model`, the folder that `dalle_jax.load` opens. Source: ours.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, Union, runtime_checkable

import jax
import tyro

from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.data.batches import batches, one_epoch
from dalle_jax.data.sources import ConcatSource, DataSource
from dalle_jax.errors import UserError
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import CLIP_FOLDER, CONFIG, copy_other_priors, replace_folder
from dalle_jax.image.sheet import contact_sheet, save_png
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.models.codec import TITLES, CodecConfig
from dalle_jax.parallel.mesh import gather_to_host
from dalle_jax.parallel.processes import ProcessConfig, is_leader, join, leader_first
from dalle_jax.terminal import be_quiet, complaints, show_log_lines
from dalle_jax.text.bpe import SMALLEST_VOCABULARY, TextError, Tokenizer
from dalle_jax.train import checkpoint_diff, loop
from dalle_jax.train.clip_stage import ClipRun, ClipStage
from dalle_jax.train.dvae_stage import DVAERun, DVAEStage
from dalle_jax.train.encode import EncodedBatches, cached_codes, cached_reconstructions
from dalle_jax.train.log import read_metrics
from dalle_jax.train.loop import train
from dalle_jax.train.prior_stage import PriorRun, PriorStage
from dalle_jax.train.progressive_stage import ProgressiveRun, ProgressiveStage, progressive_run
from dalle_jax.train.run_tokenizer import run_tokenizer
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

log = logging.getLogger(__name__)

MAY_CHANGE = (
    *(f"loop.{name}" for name in loop.MAY_CHANGE),
    "run.remat",  # memory and time, but not what is computed
    "run.scan_layers",
    "run.micro_batch",
)
"""Settings that may differ between a checkpoint and the run that goes on with it."""

START_IMAGES = 1024  # images that the k-means start of a codebook looks at

Codec = Annotated[
    str,
    tyro.conf.arg(
        help="What makes codes of images: dvae or vqgan, that of the workdir; or the folder of "
        "a model, such as one that was imported, or the name of a shipped one."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Opened images and captions, and what a model card has to say of them."""

    train: DataSource
    validation: DataSource
    captions: Sequence[str]
    """Drawn on the sample sheets."""
    attribution: str
    """Markdown for the model card: where the images are from and on which terms."""
    license: str = ""
    """Terms for weights trained on them; empty if their owner has not said."""


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


def train_codec(run: DVAERun | VQGANRun, data: Data, *, name: str, workdir: Path) -> Model:
    """Trains a dVAE or VQ-GAN, or goes on with it, and writes the folder `model` below workdir."""
    stage = (VQGANStage if isinstance(run, VQGANRun) else DVAEStage)(
        run,
        start_images=lambda: _first_images(data.train, run.px),
        validation=lambda: one_epoch(data.validation, batch_size=64, px=run.px),
    )
    iterator = batches(
        data.train,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        px=run.px,
        crop="dvae",
        **_reading(),
    )
    state = train(
        stage,
        iterator,
        config=run.loop,
        workdir=workdir,
        settings=_settings(run),
        defaults=_defaults(run),
        may_change=MAY_CHANGE,
    )
    model = Model(
        name=name,
        px=run.px,
        codec=run.model,
        codec_params=jax.device_get(gather_to_host(stage.network(state.ema_params))),
        card=_card(name, data, [_summary(stage.name, run, state.step, workdir)]),
        license=data.license,
    )
    if is_leader():
        model.save(workdir / "model")
    return model


def train_prior(run: PriorRun, data: Data, tokens: Model, *, workdir: Path) -> Model:
    """Trains a prior of either kind, or goes on with it; gives the whole model, not yet saved.

    The weights of the model stay spread over the devices that trained them: of several processes
    all have to write it together.
    """
    run, tokenizer = _with_tokenizer(run, data, workdir)
    text = {"px": tokens.px, "tokenizer": tokenizer, "text_length": run.model.text_length}
    validation = data.validation
    if run.loop.evaluate_every is not None:  # needed again and again, so always made once
        validation = cached_codes(validation, tokens, workdir / "codes" / "validation")
    stage = (ProgressiveStage if isinstance(run, ProgressiveRun) else PriorStage)(
        run,
        tokens=tokens,
        tokenizer=tokenizer,
        validation=lambda: one_epoch(validation, batch_size=64, **text),
        captions=data.captions,
    )
    source = data.train
    if run.encode_once:
        source = cached_codes(source, tokens, workdir / "codes" / "train")
    iterator = batches(
        source,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        crop="prior",
        bpe_dropout=run.bpe_dropout,
        caption_dropout=run.caption_dropout,
        **text,
        **_reading(),
    )
    if not run.encode_once:
        iterator = EncodedBatches(iterator, tokens)
    fingerprints = tokens.fingerprints | {"tokenizer": tokenizer.fingerprint}
    state = train(
        stage,
        iterator,
        config=run.loop,
        workdir=workdir,
        settings=_settings(run) | {"fingerprints": fingerprints},
        defaults=_defaults(run),
        may_change=MAY_CHANGE,
    )
    stages = [line for line in tokens.card.splitlines() if line.startswith(f"- {tokens.kind}:")]
    card = _card(tokens.name, data, [*stages, _summary(stage.name, run, state.step, workdir)])
    return stage.to_model(state.ema_params, card=card, license=data.license)


def train_clip(run: ClipRun, data: Data, tokens: Model | None, *, name: str, workdir: Path) -> Clip:
    """Trains the CLIP, or goes on with it, and writes the folder `model` below workdir.

    Args:
      run: the settings.
      data: what it is trained and measured on.
      tokens: its codec redraws the images; None for none.
      name: of the experiment.
      workdir: folder of this run alone.
    """
    run, tokenizer = _with_tokenizer(run, data, workdir)
    px = run.model.px
    text = {"tokenizer": tokenizer, "text_length": run.model.slots + 1}  # no end token in batches
    source, measured = data.train, {"": data.validation}
    if tokens is not None:
        folder = workdir / "reconstructed" / "train"
        source = ConcatSource(source, cached_reconstructions(source, tokens, folder))
        if run.loop.evaluate_every is not None:
            folder = workdir / "reconstructed" / "validation"
            measured["reconstructed_"] = cached_reconstructions(data.validation, tokens, folder)
    stage = ClipStage(
        run,
        validation={
            beginning: partial(one_epoch, images, batch_size=64, px=px, **text)
            for beginning, images in measured.items()
        },
    )
    iterator = batches(
        source,
        batch_size=run.batch_size,
        seed=run.loop.seed,
        px=px,
        crop="prior",  # not mirrored, since captions say left and right
        **text,
        **_reading(),
    )
    fingerprints = {"tokenizer": tokenizer.fingerprint}
    if tokens is not None:
        fingerprints |= tokens.fingerprints
    state = train(
        stage,
        iterator,
        config=run.loop,
        workdir=workdir,
        settings=_settings(run) | {"fingerprints": fingerprints},
        defaults=_defaults(run),
        may_change=MAY_CHANGE,
    )
    clip = Clip(
        name=name,
        config=run.model,
        params=jax.device_get(gather_to_host(state.ema_params)),
        tokenizer=tokenizer,
        card=_card(
            name,
            data,
            [_summary("clip", run, state.step, workdir)],
            opener="dalle_jax.Clip.load",
        ),
        license=data.license,
    )
    if is_leader():
        clip.save(workdir / "model")
    return clip


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
        tokens = _tokens(options)
        _check_fit(prior, px=tokens.px, codec=tokens.codec, title=TITLES[tokens.kind])
        data = _opened(options.data, tokens.px)
        model = train_prior(prior, data, tokens, workdir=workdir / stage)
        _save(model, workdir)
        log.info("the model is in %s", workdir / "model")
        if is_leader() and prior.loop.sheet_every is not None:
            model = Model.load(workdir / "model")  # on one device
            sheet = workdir / "sheet.png"
            save_png(sheet, contact_sheet(model.generate(data.captions, n=4), data.captions))
            log.info("images it drew are in %s", sheet)
    if clip is not None:
        tokens = _tokens(options) if clip.reconstructions else None
        data = _opened(options.data, clip.model.px)
        train_clip(clip, data, tokens, name=name, workdir=workdir / clip.folder)
        log.info("the CLIP is in %s", workdir / clip.folder / "model")
        if is_leader() and clip.folder == CLIP_FOLDER and (workdir / "model" / CONFIG).is_file():
            with replace_folder(workdir / "model") as new:
                shutil.copytree(workdir / "model", new, dirs_exist_ok=True)
                _add_clip(workdir, new)


def _tokens(options: Any) -> Model:
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


def _first_images(source: DataSource, px: int):
    return next(one_epoch(source, batch_size=START_IMAGES, px=px))["image"]


def _reading() -> dict[str, int]:
    """Which part of every batch this process makes, and by how many threads."""
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    usable = getattr(os, "sched_getaffinity", None)  # Linux
    return share | {"threads": max(4, len(usable(0)) if usable else os.cpu_count() or 1)}


def _with_tokenizer(run: Any, data: Data, workdir: Path) -> tuple[Any, Tokenizer]:
    """Gives the run's tokenizer, and the run with the vocabulary that it got."""
    wanted = run.model.text_vocabulary
    tokenizer = run_tokenizer(data.train, vocabulary=wanted, folder=workdir)
    if tokenizer.vocabulary != run.model.text_vocabulary:
        log.info(
            "the captions give a vocabulary of %d, not %d",
            tokenizer.vocabulary,
            run.model.text_vocabulary,
        )
        sizes = dataclasses.replace(run.model, text_vocabulary=tokenizer.vocabulary)
        run = dataclasses.replace(run, model=sizes)
    return run, tokenizer


def _settings(run: Any) -> dict:
    """What is saved with a checkpoint; all but `MAY_CHANGE` has to agree on resume."""
    return _in_two(dataclasses.asdict(run))


def _defaults(run: Any) -> dict:
    """What those settings stand for that a checkpoint is too old to have."""
    return _in_two(checkpoint_diff.defaults(run))


def _in_two(fields: dict) -> dict:
    loop = fields.pop("loop")
    return {"run": fields, "loop": loop}


def _card(name: str, data: Data, stages: Sequence[str], *, opener: str = "dalle_jax.load") -> str:
    """The model card: a line for each trained stage, and where the data is from."""
    head = [f"# {name}", "", f"A dalle_jax model: `{opener}` opens this folder.", ""]
    terms = f"\nTerms of the weights: {data.license}." if data.license else ""
    return "\n".join([*head, *stages, "", "## Data", "", data.attribution + terms, ""])


def _summary(stage: str, run: Any, step: Any, workdir: Path) -> str:
    """What a stage trained, for how long, and what it measured at the end, as one line.

    `step` are the updates done, which may be more than the run asks for.
    """
    measured = [
        f"{name.removeprefix('eval/')} {value:.4g}"
        for entry in read_metrics(workdir / "metrics.jsonl")[-1:]
        for name, value in entry.items()
        if name.startswith("eval/")
    ]
    sizes = ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(run.model).items())
    return (
        f"- {stage}: {int(step):,} updates of {run.batch_size} examples ({sizes}); "
        f"on validation images: {', '.join(measured) or 'not measured'}"
    )
