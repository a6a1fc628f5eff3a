"""The folder of a report: Markdown, JSON, plots and sheets.

Source: ours.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dalle_jax import atomic
from dalle_jax.errors import UserError
from dalle_jax.evaluate.studies import Row
from dalle_jax.image.sheet import save_png


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report.

    Attributes:
      key: its name in report.json.
      title: its heading.
      note: explains it.
      rows: the metrics.
      plot_over: the column that all others are plotted over; "" for no plot.
      sheet: images to look at.
    """

    key: str
    title: str
    note: str = ""
    rows: list[Row] = field(default_factory=list)
    plot_over: str = ""
    sheet: UInt8[np.ndarray, "H W 3"] | None = None


def write(out: Path, sections: Sequence[Section]) -> None:
    """Writes the folder; the first section is the request."""
    out.mkdir(parents=True, exist_ok=True)
    pages = []
    for section in sections:
        page = [f"## {section.title}", section.note, _table(section.rows)]
        if section.plot_over and len(section.rows) > 1:
            _plot(out / f"{section.key}.png", section.rows, section.plot_over)
            page.append(f"![{section.title}]({section.key}.png)")
        if section.sheet is not None:
            save_png(out / f"{section.key}-sheet.png", section.sheet)
            page.append(f"![{section.title}]({section.key}-sheet.png)")
        pages += [part for part in page if part]
    numbers = {section.key: section.rows for section in sections if section.rows}
    write_text(out / "report.json", json.dumps(numbers, indent=2) + "\n")
    request = sections[0].rows[0]
    title = f"# {request['model']} on {request['suite']}"
    write_text(out / "report.md", "\n\n".join([title, *pages]) + "\n")


def _table(rows: Sequence[Row]) -> str:
    """Markdown; a single row with many columns has a line for each of them."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) == 1:
        head, body = ["", ""], [[name, _format(rows[0][name])] for name in names]
    else:
        head, body = names, [[_format(row.get(name, "")) for name in names] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):  # mean, and the ends of its interval
        mean, low, high = value
        return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f}-{high:.3f})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(part)}" for name, part in value.items())
    return str(value)


def _plot(path: Path, rows: Sequence[Row], over: str) -> None:
    columns = [name for name in rows[0] if name != over and not name.endswith("+-")]
    figure_class, canvas_class = plotting()
    figure = figure_class(figsize=(3 * len(columns), 2.6))
    canvas_class(figure)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.2, top=0.88, wspace=0.3)
    for name, axes in zip(columns, figure.subplots(1, len(columns), squeeze=False)[0], strict=True):
        errors = [row.get(f"{name} +-", 0) for row in rows]
        axes.errorbar(
            [row[over] for row in rows], [row[name] for row in rows], errors, marker=".", capsize=2
        )
        axes.set_title(name, fontsize=8)
        axes.set_xlabel(over, fontsize=8)
        axes.tick_params(labelsize=7)
        if over == "N":
            axes.set_xscale("log", base=2)
    with atomic.replaced(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def plotting() -> tuple[type, type]:
    """Matplotlib's figure and canvas; a UserError says what to install if it is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "plots need the package matplotlib: pip install dalle_jax[evaluate]"
        ) from error
    return Figure, FigureCanvasAgg


def write_text(path: Path, text: str) -> None:
    """Writes a text file, complete or not at all."""
    atomic.write(path, text)
