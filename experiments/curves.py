"""Draws the curves of a run from its metrics.jsonl (needs matplotlib).

python experiments/curves.py runs/emoji/dvae/metrics.jsonl nll kl eval/psnr --out docs/dvae.png
"""

from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")  # a file is wanted, not a window

import matplotlib.pyplot as plt
import numpy as np
import tyro

from dalle_jax.train.log import read_metrics


def main(
    metrics: Annotated[Path, tyro.conf.Positional],
    names: Annotated[list[str], tyro.conf.Positional],
    out: Path,
) -> None:
    """Draws one panel for each metric over updates.

    Args:
      metrics: a run's metrics.jsonl.
      names: metrics to draw, as they are called in the file.
      out: image file to write.
    """
    entries = read_metrics(metrics)
    known = sorted({name for entry in entries for name in entry})
    for name in names:
        if name not in known:
            raise SystemExit(f"{metrics} has no metric {name!r}; it has {', '.join(known)}")
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        panel.set(title=name, xlabel="updates")
        panel.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    print(out)


def compare(curves: dict[str, np.ndarray], out: Path, *, dashed: str = "") -> None:
    """Draws losses of several runs in one panel, smoothed over ten updates.

    Args:
      curves: nats per token at each update, by the names of the runs.
      out: image file to write.
      dashed: name of one that lies on another.
    """
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, curve in curves.items():
        smooth = np.convolve(curve, np.ones(10) / 10, "valid")
        axes.plot(smooth, "--" if name == dashed else "-", label=name)
    axes.set(xlabel="updates", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
