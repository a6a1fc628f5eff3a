"""The composition study of a report: samples its cases and measures them.

Source: ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dalle_jax.data.sources import DataSource
from dalle_jax.evaluate.composition import Case, Judge, Row, chance, table
from dalle_jax.evaluate.emoji_cases import FAMILIES, emoji_cases
from dalle_jax.evaluate.image_sets import sampled_images, stack_images
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.evaluate.suites import decode_images
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

NOTE = (
    "Held-out combinations, each beside a seen one: does the judge rank the right caption first "
    "among those that differ in one axis alone (ties are wrong); all: in every axis. Similarity: "
    "cosine of the true image and the nearest sample, by the judge's features; "
    "composed: that one is nearer to the true image than to any of training; beyond memory: it "
    "is nearer to the true image than any of training is. Nearest caption: the training image "
    "that retrieval would show. Means with 95 % intervals over cases."
)


def composition_study(
    model: Model,
    judge: Judge,
    open_split: Callable[[str], DataSource],
    *,
    sampling: SamplingConfig,
    n: int,
    num_cases: int | None,
    seed: int,
    cache: ResultCache,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Generates n images of each case, and measures them and what they are compared with.

    Args:
      model: trained on the emoji's training split alone.
      judge: neither the reranker nor of its data alone.
      open_split: gives a split of the emoji by name.
      sampling: how to sample.
      n: images of each case.
      num_cases: held-out cases of each family, each with its seen partner; None for all.
      seed: of the samples.
      cache: for samples.
      progress: called with the cases sampled so far and in all.
    Returns:
      Rows of a table, the numbers as [mean, lower end, upper end].
    """
    cases = _first(emoji_cases(open_split), num_cases)
    sources = {split: open_split(split) for split in ("train", *FAMILIES.values())}
    records = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
    images = {r["id"]: r["image"] for found in records.values() for r in found}
    captions = [case.caption for case in cases]
    samples = stack_images(
        sampled_images(model, captions, sampling, n=n, seed=seed, cache=cache),
        lambda done: progress(done, len(cases)),
    )
    truth = decode_images([images[case.id] for case in cases], model.px)
    rows = table(
        cases,
        samples,
        truth=truth,
        reconstructions=model.decode(model.encode(truth)),
        training=decode_images([record["image"] for record in records["train"]], model.px),
        ids=[record["id"] for record in records["train"]],
        captions=[record["captions"] for record in records["train"]],
        judge=judge,
    )
    return [_line(row) for row in rows] + [
        {"family": family, "images": "chance"}
        | {axis: [share] * 3 for axis, share in _chances(cases, family).items()}
        for family in FAMILIES
    ]


def _first(cases: Sequence[Case], num_cases: int | None) -> list[Case]:
    """The first held-out cases of each family, each with the seen one that follows it."""
    chosen, found = [], dict.fromkeys(FAMILIES, 0)
    for case in cases:
        found[case.family] += case.held_out
        if num_cases is None or found[case.family] <= num_cases:
            chosen.append(case)
    return chosen


def _line(row: Row) -> dict[str, Any]:
    head = {
        "family": row.family,
        "cases": f"{row.cases} {'held out' if row.held_out else 'seen'}",
        "images": row.images,
    }
    return head | {name: list(value) for name, value in row.values.items()}


def _chances(cases, family):
    return chance([case for case in cases if case.family == family])
