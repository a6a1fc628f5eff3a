"""The model card of a trained model: what each stage did, and where the data is from.

Source: ours.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_jax.train.log import read_metrics


def model_card(
    name: str,
    stages: Sequence[str],
    *,
    attribution: str,
    license: str,
    opener: str = "dalle_jax.load",
) -> str:
    """Writes a model card in Markdown.

    Args:
      name: of the model.
      stages: a line for each trained stage, from `stage_summary`.
      attribution: where the data is from, and on which terms.
      license: of the weights; empty if the owner of the data has not said.
      opener: the function that opens the folder.
    """
    head = [f"# {name}", "", f"A dalle_jax model: `{opener}` opens this folder.", ""]
    terms = f"\nTerms of the weights: {license}." if license else ""
    if "\n" in license:
        terms = "\n\nTerms of the weights: see LICENSE."
    return "\n".join([*head, *stages, "", "## Data", "", attribution + terms, ""])


def stage_summary(stage: str, run: Any, step: Any, workdir: Path) -> str:
    """What a stage trained, for how long, and its last evaluation, as one line.

    Args:
      stage: its name.
      run: its settings.
      step: steps done, which may be more than the run asks for.
      workdir: of the stage, with its metrics.jsonl.
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
