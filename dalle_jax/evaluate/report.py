"""The report on a model: a folder with all metrics, the request that gave them, plots and sheets.

report.json     request and metrics; the same request gives the same file
report.md       the same for people, with the images below
*.png           plots and sheets
cache/          sampled images and features, from which a stopped evaluation goes on
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.evaluate import studies
from dalle_jax.evaluate.composition import Judge
from dalle_jax.evaluate.composition_study import NOTE, composition_study
from dalle_jax.evaluate.evaluation_config import STUDIES, EvaluationConfig
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.image_sets import (
    first_of_each,
    real_images,
    reconstructions,
    sampled_images,
    stack_images,
)
from dalle_jax.evaluate.likelihood import codec_quality, prior_nats
from dalle_jax.evaluate.report_files import Section, plotting, write
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.evaluate.retrieval import NOTE as RETRIEVAL_NOTE
from dalle_jax.evaluate.retrieval import retrieval_study
from dalle_jax.evaluate.studies import RADII, ImageMetrics
from dalle_jax.evaluate.suites import Suite, open_emoji
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.sheet import contact_sheet

SHEET_CAPTIONS = 12
PRIOR_TITLES = {"prior": "Autoregressive prior", "progressive": "Progressive prior"}


def evaluate(
    model: Model,
    suite: Suite,
    *,
    out: str | os.PathLike,
    config: EvaluationConfig,
    networks: Sequence[Network],
    chosen: Sequence[str] = STUDIES,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    reranker: Judge | None = None,
    judge: Judge | None = None,
    show: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> list[Section]:
    """Measures a model on a suite and writes the report.

    Args:
      model: has a prior.
      suite: captions, and real images to compare with.
      out: folder of the report.
      config: how much to sample.
      networks: whose features are compared.
      chosen: which studies.
      sampling: how to sample, where a study does not change it.
      seed: of all samples.
      reranker: chooses the best of N; without it that study is left out.
      judge: gives CLIP scores and judges composition, which is left out without it; another model
        than the reranker, which favours what it chose.
      show: returns a progress bar with a title, such as `terminal.bar`.
    Returns:
      The sections of the report.
    Raises:
      UserError: if a study is unknown, there are too few images to compare, or matplotlib, which
        plots, is not installed.
    """
    if unknown := set(chosen) - set(STUDIES):
        raise UserError(
            f"there is no study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}"
        )
    plotting()  # raises before hours of work if it is missing
    sampling = model.as_recommended(sampling)
    out = Path(out)
    cache = ResultCache(out / "cache")
    small = suite.head(config.captions)
    px = model.px
    if (fewest := min(len(small.captions), len(suite.real))) < 2:
        raise UserError(f"a distance needs 2 images or more of both kinds, got {fewest}")

    with show("Reading") as progress:
        truth = list(real_images(suite, small.truth, px))
        real = list(real_images(suite, suite.real, px))
        progress(1, 1)
    with show("Generating") as progress:
        samples = list(
            first_of_each(
                sampled_images(model, small.captions, sampling, n=1, seed=seed, cache=cache)
            )
        )
        done = 0
        for batch in samples:
            done += len(batch.images())
            progress(done, len(small.captions))

    sections = [_request(model, suite, small, config, sampling, seed, networks)]
    with show("Measuring") as progress:
        metrics = ImageMetrics(networks=networks, cache=cache, judge=judge, progress=progress)
        reconstructed = list(reconstructions(model, truth))
        sections.append(
            Section(
                key="distances",
                title="Distance from the real images",
                note=f"{len(small.captions)} samples, {sampling.describe()}, against "
                f"{len(suite.real)} real images. Reconstructions are the true images of the same "
                "captions, encoded and decoded: what no sample can surpass.",
                rows=[
                    {"images": name} | metrics.compare(real, kind, captions=small.captions)
                    for name, kind in (("samples", samples), ("reconstructions", reconstructed))
                ],
            )
        )
        sections += [
            Section(
                key="codec",
                title="Codec",
                note="PSNR in dB; foreground is what is not white.",
                rows=[codec_quality(model, real)],
            ),
            _samples(small, truth, reconstructed, samples),
        ]
        for part, title in PRIOR_TITLES.items():
            if part in model.priors:
                nats = prior_nats(model, part, truth, small.captions, small.families)
                sections.append(
                    Section(
                        key=part,
                        title=title,
                        note="Nats per token on the true captions and images, in raster order.",
                        rows=[{"family": family} | row for family, row in nats.items()],
                    )
                )
        if "blur" in chosen:
            sections.append(
                Section(
                    key="blur",
                    title="Blur",
                    note="Radius: standard deviation of the Gaussian in pixels of an image of "
                    f"256, on both sides; at {px} px it is radius x {px} / 256.",
                    rows=studies.blur_study(metrics, real, samples, RADII),
                    plot_over="radius",
                )
            )
        if "sampling" in chosen:
            captions = small.captions[: config.sampling_captions]
            settings = config.settings(sampling)
            rows = studies.sampling_study(
                metrics, real, model, captions, settings, seed=seed, cache=cache
            )
            sections.append(
                Section(
                    key="sampling",
                    title="Sampling",
                    note=f"{len(captions)} captions, one image each.",
                    rows=rows,
                    sheet=_sampling_sheet(model, captions, settings, seed, cache),
                )
            )
        if "rerank" in chosen and reranker is not None:
            captions = small.captions[: config.rerank_captions]
            n = config.rerank_samples
            many = list(sampled_images(model, captions, sampling, n=n, seed=seed, cache=cache))
            scores = studies.clip_scores(reranker, many, captions)
            sections.append(
                Section(
                    key="rerank",
                    title="The best of N",
                    note=f"{len(captions)} captions, the first N images, the best by the reranker.",
                    rows=studies.rerank_study(metrics, real, many, scores, captions),
                    plot_over="N",
                    sheet=_rerank_sheet(many, scores, captions),
                )
            )
    if "composition" in chosen and judge is not None and suite.name == "emoji":
        with show("Composition") as progress:
            rows = composition_study(
                model,
                judge,
                partial(open_emoji, px=px),
                sampling=sampling,
                n=config.composition_samples,
                num_cases=config.composition_cases,
                seed=seed,
                cache=cache,
                progress=progress,
            )
        sections.append(Section(key="composition", title="Composition", note=NOTE, rows=rows))
    if "retrieval" in chosen and suite.name == "emoji":
        with show("Retrieval") as progress:
            rows = retrieval_study(
                model,
                partial(open_emoji, px=px),
                sampling=sampling,
                n=config.retrieval_samples,
                captions=config.retrieval_captions,
                seed=seed,
                cache=cache,
                reranker=reranker,
                progress=progress,
            )
        title = "Right among all emoji"
        sections.append(Section(key="retrieval", title=title, note=RETRIEVAL_NOTE, rows=rows))
    write(out, sections)
    return sections


def _request(model, suite, small, config, sampling, seed, networks) -> Section:
    row = {
        "model": model.name,
        "fingerprints": model.fingerprints,
        "suite": suite.name,
        "captions": len(small.captions),
        "truncated captions": _truncated(model, small.captions),
        "real images": len(suite.real),
        "px": model.px,
        "seed": seed,
        "sampling": dataclasses.asdict(sampling),
        "config": dataclasses.asdict(config),
        "networks": {network.name: network.fingerprint for network in networks},
    }
    return Section(key="request", title="Request", rows=[row])


def _truncated(model, captions) -> int:
    """How many captions have more tokens than the model takes."""
    sizes, _ = next(iter(model.priors.values()))
    before = model.tokenizer.truncated
    model.tokenizer.encode(captions, length=sizes.text_length - 1)
    return model.tokenizer.truncated - before


def _samples(small, truth, reconstructed, samples) -> Section:
    sets = [batches[: SHEET_CAPTIONS + 1] for batches in (truth, reconstructed, samples)]
    columns = [stack_images(batches)[:SHEET_CAPTIONS] for batches in sets]
    sheet = contact_sheet(np.stack(columns, axis=1), small.captions[: len(columns[0])])
    return Section(
        key="samples",
        title="Samples",
        note="The first captions: true image, reconstruction, sample.",
        sheet=sheet,
    )


def _sampling_sheet(model, captions, settings, seed, cache):
    captions = captions[: min(len(captions), 8)]
    rows = []
    for sampling in settings:
        batches = first_of_each(
            sampled_images(model, captions, sampling, n=1, seed=seed, cache=cache)
        )
        rows.append(stack_images(batches))
    return contact_sheet(np.stack(rows), [sampling.describe() for sampling in settings])


def _rerank_sheet(batches, scores, captions):
    n = scores.shape[1]
    counts = sorted({max(1, n // 64), max(1, n // 8), n, 1})
    shown = captions[: min(len(captions), SHEET_CAPTIONS)]
    best = [stack_images(studies.best_of(batches, scores, count))[: len(shown)] for count in counts]
    labels = [f"{caption}: best of {', '.join(map(str, counts))}" for caption in shown]
    return contact_sheet(np.stack(best, axis=1), labels)
