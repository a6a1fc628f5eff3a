"""`dalle-jax evaluate`: a report on a model."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from dalle_jax.commands.process import prepare_process
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.option_checks import check_input, check_output_folder, check_seed
from dalle_jax.terminal import bar


def evaluate(
    *,
    model: str = "emoji",
    dtype: Literal["float32", "bfloat16"] = "float32",
    suite: Literal["emoji", "coco", "cub", "folder"] = "emoji",
    data: Path | None = None,
    split: str | None = None,
    out: Path = Path("report"),
    quick: bool = False,
    num_captions: int | None = None,
    studies: tuple[Literal["blur", "sampling", "rerank", "composition", "retrieval"], ...] = (
        "blur",
        "sampling",
        "rerank",
        "composition",
        "retrieval",
    ),
    seed: int = 0,
    sampling: Annotated[SamplingConfig, arg(name="")] = SamplingConfig(),
    inception: Path | None = None,
    clip: Path | None = None,
    judge: Path | None = None,
) -> None:
    """Measure a model: distances to real images, and studies of blur, sampling and reranking.

    The same command goes on where it was stopped. Writes report.md, report.json, plots and sheets.

    Args:
      model: A shipped model by name, or the path of a model folder.
      dtype: Type of the prior's kernels in memory; bfloat16 halves them.
      suite: Captions and real images: emoji; or coco (30,000 captions), cub (all captions) or
        folder (a caption an image), of the set that --data names.
      data: Folder of captioned images, or one that TensorFlow Datasets prepared.
      split: Part of the data; by default validation, of CUB test, of a plain folder all of it.
      out: Folder for the report, and for the cache of its samples and features.
      quick: Generate and compare less: minutes instead of hours with the shipped model on two
        cores.
      num_captions: Captions of the suite to generate images for, a random choice; None for all
        (256 with --quick).
      studies: Which studies to make besides the main numbers.
      seed: Number from 0 to 4294967295; the same one gives the same numbers.
      sampling: How codes are sampled.
      inception: File pt_inception-2015-12-05-6726825d.pth, for the FID, KID and IS that others
        publish; without it EfficientNet-Lite0 takes its place, and the numbers carry its name.
      clip: Folder of the CLIP that reranks; by default the model's own, if it has one.
      judge: Folder of another CLIP, which scores how well images fit their captions, and without
        which composition (of emoji) is not studied.
    """
    check_input("--inception", inception)
    check_output_folder("--out", out)
    check_seed(seed)
    prepare_process()
    import dalle_jax
    from dalle_jax.evaluate import report
    from dalle_jax.evaluate.evaluation_config import EvaluationConfig, quick_config
    from dalle_jax.evaluate.features import efficientnet_network, inception_network
    from dalle_jax.evaluate.suites import open_suite

    config = quick_config() if quick else EvaluationConfig()
    if num_captions is not None:
        config = dataclasses.replace(config, captions=num_captions)
    start = time.monotonic()
    loaded = dalle_jax.load(model, dtype=dtype)
    network = efficientnet_network() if inception is None else inception_network(inception)
    sections = report.evaluate(
        loaded,
        open_suite(suite, data=data, split=split, px=loaded.px, seed=seed),
        out=out,
        config=config,
        networks=[network],
        chosen=studies,
        sampling=sampling,
        seed=seed,
        reranker=loaded.clip if clip is None else dalle_jax.Clip.load(clip),
        judge=None if judge is None else dalle_jax.Clip.load(judge),
        show=bar,
    )
    took = time.monotonic() - start
    for section in sections:
        if section.key == "distances":
            for row in section.rows:
                print(", ".join(f"{name} {_short(value)}" for name, value in row.items()))
    print(f"measured in {took:.0f} s: {(out / 'report.md').resolve()}")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
