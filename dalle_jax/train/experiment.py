"""The command line of the scripts under experiments/.

Source: ours.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.models.codec import TITLES
from dalle_jax.parallel.processes import ProcessConfig, is_leader, join
from dalle_jax.terminal import be_quiet, complaints, show_log_lines
from dalle_jax.train.all_stages import PRIOR_STAGES, train_stages
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.data_options import DataOptions
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.progressive_stage import progressive_run
from dalle_jax.train.vqgan_stage import VQGANRun

Codec = Annotated[
    str,
    tyro.conf.arg(
        help="What makes codes of images: dvae or vqgan, that of the workdir; or the folder of "
        "a model, such as one that was imported, or the name of a shipped one."
    ),
]

Continued = Annotated[
    bool,
    tyro.conf.arg(
        help="Begin with the prior of --codec, a model of these sizes, and keep its tokenizer."
    ),
]

KeepTokenizer = Annotated[
    bool,
    tyro.conf.arg(
        help="Keep the tokenizer of --codec, a model with priors, so that the new prior joins them."
    ),
]


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
    if set(runs) <= set(PRIOR_STAGES):
        fields.append(("continued", Continued, dataclasses.field(default=False)))
        fields.append(("keep_tokenizer", KeepTokenizer, dataclasses.field(default=False)))
    for stage, run in runs.items():
        # One stage alone needs no prefix before its options.
        prefix = stage if len(runs) > 1 else ""
        kind = Annotated[type(run), tyro.conf.arg(name=prefix)]
        fields.append((stage, kind, dataclasses.field(default=run)))
    options = dataclasses.make_dataclass(command.title(), fields, frozen=True, kw_only=True)
    options.__doc__ = doc
    return Annotated[options, tyro.conf.subcommand(command, prefix_name=False)]


def _run(name: str, options: Any) -> None:
    wanted = getattr(options, "codec", None)  # one of two in `all`
    codecs = {stage: getattr(options, stage, None) for stage in TITLES}
    priors = {stage: getattr(options, stage, None) for stage in PRIOR_STAGES}
    train_stages(
        name,
        data=options.data,
        workdir=options.workdir,
        codecs={stage: run for stage, run in codecs.items() if run and wanted in (stage, None)},
        priors={stage: run for stage, run in priors.items() if run is not None},
        clip=getattr(options, "clip", None),
        codec=wanted or "dvae",
        continued=getattr(options, "continued", False),
        keep_tokenizer=getattr(options, "keep_tokenizer", False),
    )
