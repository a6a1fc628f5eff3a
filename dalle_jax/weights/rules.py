"""From the names of others' weights to ours and back, by a table of rules.

A rule names a tensor of theirs and the place in ours where it belongs:

    Rule("text.layers.{i}.mlp.weight", "text/layers/mlp/kernel[{i}]", (1, 0))

`{i}` and `{j}` stand for whole numbers, `{*}` for anything; in brackets stands the part of our
array that the tensor fills, as numpy writes it, and last the order of the tensor's axes. Axes that
ours has joined or split (heads) follow from the shapes. A rule without a place leaves a tensor out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np

from dalle_jax.weights.errors import WeightsError

Shape = tuple[int, ...]

CONV = (2, 3, 1, 0)
"""Kernels of convolutions: D C S S becomes S S C D."""
MATRIX = (1, 0)
"""Kernels of linear layers: out, in becomes in, out."""
_LISTED = 8  # names in a message


class Rule(NamedTuple):
    """Where a tensor of theirs belongs."""

    theirs: str
    ours: str | None = None
    axes: tuple[int, ...] | None = None


def to_ours(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Fills our arrays with their tensors; theirs are not changed, and copied once.

    Args:
      tensors: theirs, by their names.
      rules: the first that fits counts.
      shapes: of all our arrays, by our names.
    Returns:
      Our arrays, in float32.
    Raises:
      WeightsError: if a tensor has no rule, a place is left empty or has another shape; all names
        are listed.
    """
    compiled = [(re.compile(_pattern(rule.theirs)), rule) for rule in rules]
    arrays: dict[str, np.ndarray] = {}
    filled = dict.fromkeys(shapes, 0)
    problems: dict[str, list[str]] = {"unknown": [], "misfit": [], "missing": []}
    for name, tensor in tensors.items():
        found = next(((m, rule) for p, rule in compiled if (m := p.fullmatch(name))), None)
        if found is None:
            problems["unknown"].append(name)
            continue
        match, rule = found
        if rule.ours is None:
            continue
        ours, index = _place(rule.ours, match.groupdict())
        if ours not in shapes:
            problems["unknown"].append(name)
            continue
        problem = _misfit(tensor, rule.axes, shapes[ours], index)
        if problem:
            problems["misfit"].append(f"{name} {problem}")
            continue
        if ours not in arrays:
            arrays[ours] = np.empty(shapes[ours], np.float32)
        part = arrays[ours][index]
        part[...] = tensor.transpose(rule.axes).reshape(part.shape)
        filled[ours] += part.size
    problems["missing"] = [name for name, n in filled.items() if n != math.prod(shapes[name])]
    if any(problems.values()):
        raise WeightsError(_said(problems))
    return arrays


def to_theirs(
    arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Undoes `to_ours` for rules whose places are whole arrays and whose axes are not joined.

    Args:
      arrays: ours, by our names.
      rules: the table.
      names: theirs that are wanted, in this order.
    """
    tensors = {}
    for name in names:
        for rule in rules:
            match = re.fullmatch(_pattern(rule.theirs), name)
            if match and rule.ours is not None:
                ours, _ = _place(rule.ours, match.groupdict())
                back = None if rule.axes is None else np.argsort(rule.axes)
                tensors[name] = np.ascontiguousarray(arrays[ours].transpose(back))
                break
    return tensors


def their_names(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> list[str]:
    """Names that our arrays have with them, by rules whose places are whole arrays."""
    names = []
    for ours in arrays:
        for rule in rules:
            match = rule.ours and re.fullmatch(_pattern(rule.ours), ours)
            if match:
                names.append(rule.theirs.format(**match.groupdict()))
                break
    return names


def _pattern(template: str) -> str:
    pattern = re.escape(template).replace(re.escape("{*}"), ".*")
    return re.sub(r"\\{([ij])\\}", r"(?P<\1>0|[1-9][0-9]{0,5})", pattern)


def _place(template: str, numbers: Mapping[str, str]) -> tuple[str, tuple]:
    name, _, index = template.format(**numbers).rstrip("]").partition("[")
    parts = index.split(",") if index else []
    return name, tuple(slice(None) if part == ":" else int(part) for part in parts)


def _misfit(tensor, axes, shape, index) -> str | None:
    """What is wrong with a tensor, if it does not fit the part of an array of this shape."""
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
        return f"holds {tensor.dtype}, wanted floating-point numbers"
    has = list(tensor.shape)
    if len(index) > len(shape) or any(
        number != slice(None) and number >= size for number, size in zip(index, shape, strict=False)
    ):
        return f"has no place: ours is {list(shape)}"
    wanted = [n for n, at in zip(shape, index, strict=False) if at == slice(None)]
    wanted += shape[len(index) :]
    if axes is not None and len(axes) != len(has):
        return f"has shape {has}, wanted {len(axes)} axes"
    turned = has if axes is None else [has[axis] for axis in axes]
    ends = [set(accumulate([n for n in sizes if n != 1], mul)) for sizes in (turned, wanted)]
    joined = ends[0] <= ends[1] or ends[1] <= ends[0]
    if math.prod(turned) != math.prod(wanted) or not joined:
        return f"has shape {has}, which becomes {turned}, wanted {wanted}"
    return None


def _said(problems) -> str:
    titles = {
        "unknown": "no rule for {}",
        "misfit": "of another shape or type: {}",
        "missing": "nothing in the files for our {}",
    }

    def listed(names):
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return ", ".join(names[:_LISTED]) + more

    parts = [titles[kind].format(listed(names)) for kind, names in problems.items() if names]
    return f"these weights do not fit the source: {'; '.join(parts)}"
