"""A report: a folder with every number, how to get it again, plots and sheets.

report.json     request and numbers; the same request gives the same file
report.md       the same for people, with the pictures below
*.png           plots and sheets
kept/           drawn pictures and features, so that a stopped evaluation goes on
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.evaluate import studies
from dalle_jax.evaluate.composition import Judge
from dalle_jax.evaluate.composition_study import NOTE, composition_study
from dalle_jax.evaluate.drawing import decoded, drawn, gathered, real, singles
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.kept import Kept
from dalle_jax.evaluate.likelihood import prior_nats, tokenizer_quality
from dalle_jax.evaluate.page import Section, plotting, write
from dalle_jax.evaluate.retrieval import NOTE as RETRIEVAL_NOTE
from dalle_jax.evaluate.retrieval import retrieval_study
from dalle_jax.evaluate.studies import RADII, Bench
from dalle_jax.evaluate.suites import Suite, open_emoji
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.sheet import contact_sheet

STUDIES = ("blur", "sampling", "rerank", "composition", "retrieval")
SHOWN = 12  # captions on a sheet


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to draw; `quick_plan` is the small one.

    Attributes:
      captions: of the suite for the main numbers; None for all.
      swept: captions for each setting of sampling; None for as many as above.
      reranked: captions for the study of reranking.
      samples: pictures of each of those.
      temperatures, top_ps, guidances: the settings, one changed at a time.
      pairs: held-out cases of each family of the composition study; None for all.
      composed: pictures of each of them.
      retrieved: captions of each group of the retrieval study; None for all.
      compared: images of each of them.
    """

    captions: int | None = None
    swept: int | None = None
    reranked: int = 64
    samples: int = 512
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    top_ps: tuple[float, ...] = (0.8, 0.9, 0.95)
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    pairs: int | None = None
    composed: int = 4
    retrieved: int | None = 256
    compared: int = 8

    def settings(self, usual: SamplingConfig) -> list[SamplingConfig]:
        """Each way of sampling once, the usual one first."""
        changed = {
            "temperature": self.temperatures,
            "top_p": self.top_ps,
            "guidance": self.guidances,
        }
        every = [
            dataclasses.replace(usual, **{name: value})
            for name, values in changed.items()
            for value in values
        ]
        return list(dict.fromkeys([usual, *every]))


def quick_plan() -> Plan:
    """Small enough for some minutes on two cores with the shipped model."""
    return Plan(
        captions=256,
        swept=128,
        reranked=16,
        samples=32,
        temperatures=(0.7, 1.0),
        top_ps=(0.9,),
        guidances=(1.0, 2.0),
        pairs=40,
        composed=2,
        retrieved=32,
        compared=4,
    )


def evaluate(
    model: Model,
    suite: Suite,
    *,
    out: str | os.PathLike,
    plan: Plan,
    networks: Sequence[Network],
    chosen: Sequence[str] = STUDIES,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    reranker: Judge | None = None,
    judge: Judge | None = None,
    show: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> list[Section]:
    """Measures a model on a suite and writes the report.

    Args:
      model: has a prior.
      suite: what to draw and what to compare with.
      out: folder of the report, made if need be.
      plan: how much to draw.
      networks: what pictures are compared by.
      chosen: which studies.
      sampling: how to draw where no study says otherwise; None for as trained.
      seed: of everything that is drawn.
      reranker: chooses among pictures; without it that study is left out.
      judge: gives CLIP scores, and verdicts on composition, which is left out without it; never
        the reranker, which finds what it chose good.
      show: gives a progress bar for what is being done, such as `terminal.bar`.
    Returns:
      The sections of the report.
    Raises:
      UserError: if a study is unknown, there are too few pictures to compare, or matplotlib, which
        plots, is not installed.
    """
    if unknown := set(chosen) - set(STUDIES):
        raise UserError(
            f"there is no study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}"
        )
    plotting()  # says so before hours of work if it is missing
    out = Path(out)
    kept = Kept(out / "kept")
    usual = sampling or SamplingConfig()
    small = suite.head(plan.captions)
    px = model.px
    if (fewest := min(len(small.captions), len(suite.real))) < 2:
        raise UserError(f"a distance needs 2 pictures or more of both kinds, got {fewest}")

    with show("Reading") as progress:
        truth = list(real(suite, small.truth, px))
        everything = list(real(suite, suite.real, px))
        progress(1, 1)
    with show("Drawing") as progress:
        parts = list(singles(drawn(model, small.captions, usual, n=1, seed=seed, kept=kept)))
        done = 0
        for part in parts:
            done += len(part.images())
            progress(done, len(small.captions))

    sections = [_request(model, suite, small, plan, usual, seed, networks)]
    with show("Measuring") as progress:
        bench = Bench(networks=networks, kept=kept, judge=judge, progress=progress)
        through = list(decoded(model, truth))
        sections.append(
            Section(
                key="distances",
                title="Distance from the real pictures",
                note=f"{len(small.captions)} drawn pictures, {usual.describe()}, against "
                f"{len(suite.real)} real ones. Through the tokenizer are the true pictures of the "
                "same captions, encoded and decoded: what no drawing can surpass.",
                rows=[
                    {"pictures": name} | bench.compare(everything, kind, captions=small.captions)
                    for name, kind in (("drawn", parts), ("through the tokenizer", through))
                ],
            )
        )
        sections += [
            Section(
                key="tokenizer",
                title="Tokenizer",
                note="PSNR in dB; foreground is what is not white.",
                rows=[tokenizer_quality(model, everything)],
            ),
            _samples(small, truth, through, parts),
        ]
        if "prior" in model.priors:  # the progressive one has no one order to be measured in
            nats = prior_nats(model, truth, small.captions, small.families)
            sections.append(
                Section(
                    key="prior",
                    title="Prior",
                    note="Nats per token on the true captions and pictures.",
                    rows=[{"family": family} | found for family, found in nats.items()],
                )
            )
        if "blur" in chosen:
            sections.append(
                Section(
                    key="blur",
                    title="Through a blur",
                    note="Radius: standard deviation of the Gaussian in pixels of a picture of "
                    f"256, on both sides; at {px} px it is radius x {px} / 256.",
                    rows=studies.blur_study(bench, everything, parts, RADII),
                    plotted="radius",
                )
            )
        if "sampling" in chosen:
            captions = small.captions[: plan.swept]
            settings = plan.settings(usual)
            rows = studies.sampling_study(
                bench, everything, model, captions, settings, seed=seed, kept=kept
            )
            sections.append(
                Section(
                    key="sampling",
                    title="Ways of sampling",
                    note=f"{len(captions)} captions, one picture each.",
                    rows=rows,
                    sheet=_of_settings(model, captions, settings, seed, kept),
                )
            )
        if "rerank" in chosen and reranker is not None:
            captions = small.captions[: plan.reranked]
            many = list(drawn(model, captions, usual, n=plan.samples, seed=seed, kept=kept))
            scored = studies.scores(reranker, many, captions)
            sections.append(
                Section(
                    key="rerank",
                    title="The best of N",
                    note=f"{len(captions)} captions, the highest scored of the first N pictures.",
                    rows=studies.rerank_study(bench, everything, many, scored, captions),
                    plotted="N",
                    sheet=_of_counts(many, scored, captions),
                )
            )
    if "composition" in chosen and judge is not None and suite.name == "emoji":
        with show("Composing") as progress:
            rows = composition_study(
                model,
                judge,
                partial(open_emoji, px=px),
                sampling=usual,
                n=plan.composed,
                pairs=plan.pairs,
                seed=seed,
                kept=kept,
                progress=progress,
            )
        sections.append(Section(key="composition", title="Composition", note=NOTE, rows=rows))
    if "retrieval" in chosen and suite.name == "emoji":
        with show("Comparing") as progress:
            rows = retrieval_study(
                model,
                partial(open_emoji, px=px),
                sampling=usual,
                n=plan.compared,
                captions=plan.retrieved,
                seed=seed,
                kept=kept,
                reranker=reranker,
                progress=progress,
            )
        title = "Right among all emoji"
        sections.append(Section(key="retrieval", title=title, note=RETRIEVAL_NOTE, rows=rows))
    write(out, sections)
    return sections


def _request(model, suite, small, plan, usual, seed, networks) -> Section:
    row = {
        "model": model.name,
        "fingerprints": model.fingerprints,
        "suite": suite.name,
        "captions": len(small.captions),
        "captions cut short": _overlong(model, small.captions),
        "real pictures": len(suite.real),
        "px": model.px,
        "seed": seed,
        "sampling": dataclasses.asdict(usual),
        "plan": dataclasses.asdict(plan),
        "networks": {network.name: network.fingerprint for network in networks},
    }
    return Section(key="request", title="What was asked", rows=[row])


def _overlong(model, captions) -> int:
    """How many captions have more tokens than the model reads."""
    sizes, _ = next(iter(model.priors.values()))
    before = model.tokenizer.truncated
    model.tokenizer.encode(captions, length=sizes.text_length - 1)
    return model.tokenizer.truncated - before


def _samples(small, truth, through, parts) -> Section:
    columns = [gathered(kind[: SHOWN + 1])[:SHOWN] for kind in (truth, through, parts)]
    sheet = contact_sheet(np.stack(columns, axis=1), small.captions[: len(columns[0])])
    return Section(
        key="samples",
        title="Samples",
        note="The first captions, none chosen: true, through the tokenizer, drawn.",
        sheet=sheet,
    )


def _of_settings(model, captions, settings, seed, kept):
    captions = captions[: min(len(captions), 8)]
    rows = []
    for sampling in settings:
        parts = singles(drawn(model, captions, sampling, n=1, seed=seed, kept=kept))
        rows.append(gathered(parts))
    return contact_sheet(np.stack(rows), [sampling.describe() for sampling in settings])


def _of_counts(parts, scored, captions):
    n = scored.shape[1]
    counts = sorted({max(1, n // 64), max(1, n // 8), n, 1})
    shown = captions[: min(len(captions), SHOWN)]
    best = [gathered(studies.best_of(parts, scored, count))[: len(shown)] for count in counts]
    labels = [f"{caption}: best of {', '.join(map(str, counts))}" for caption in shown]
    return contact_sheet(np.stack(best, axis=1), labels)
