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
from functools import partial
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np

from dalle_jax.lazy_array import LazyArray
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


def norm(theirs: str, ours: str, index: str = "") -> tuple[Rule, ...]:
    """PyTorch's norm to ours; the index is that of a layer in a stack."""
    return (
        Rule(f"{theirs}.weight", f"{ours}/scale{index}"),
        Rule(f"{theirs}.bias", f"{ours}/bias{index}"),
    )


def linear(theirs: str, ours: str, index: str = "[{i}]") -> tuple[Rule, ...]:
    """PyTorch's linear layer to ours; the index is the kernel's, with ":" for axes of its input."""
    return (
        Rule(f"{theirs}.weight", f"{ours}/kernel{index}", MATRIX),
        Rule(f"{theirs}.bias", f"{ours}/bias{index.replace(',:', '')}"),
    )


def to_ours(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> dict[str, LazyArray]:
    """Fits our arrays together from their tensors, which stay in their files.

    Args:
      tensors: theirs, by their names.
      rules: the first that fits counts.
      shapes: of all our arrays, by our names.
    Returns:
      Our arrays, in float32, each of them made from its tensors when it is used.
    Raises:
      WeightsError: if a tensor has no rule, a place is left empty or has another shape; all names
        are listed.
    """
    compiled = [(re.compile(_pattern(rule.theirs)), rule) for rule in rules]
    parts: dict[str, dict[tuple[str, ...], tuple[np.ndarray, Rule]]] = {name: {} for name in shapes}
    filled = dict.fromkeys(shapes, 0)
    problems: dict[str, list[str]] = {"unknown": [], "misfit": [], "missing": []}
    for name, tensor in tensors.items():
        found = next(((m, rule) for p, rule in compiled if (m := p.fullmatch(name))), None)
        if found and found[1].ours is None:
            continue
        place = found and _place(found[1].ours, found[0].groupdict())
        if not found or place[0] not in shapes or place[1] in parts[place[0]]:
            problems["unknown"].append(name)
            continue
        ours, index = place
        problem = _misfit(tensor, found[1].axes, shapes[ours], index)
        if problem:
            problems["misfit"].append(f"{name} {problem}")
            continue
        parts[ours][index] = tensor, found[1]
        filled[ours] += tensor.size
    problems["missing"] = [name for name, n in filled.items() if n != math.prod(shapes[name])]
    if any(problems.values()):
        raise WeightsError(_said(problems))
    return {
        name: LazyArray(
            shape=shape, dtype=np.dtype(np.float32), make=partial(_filled, shape, parts[name])
        )
        for name, shape in shapes.items()
    }


def _filled(shape, parts) -> np.ndarray:
    """An array of ours; only here memory is taken, for as many numbers as the tensors have."""
    array = np.empty(shape, np.float32)
    for index, (tensor, rule) in parts.items():
        part = array[(*map(_numpy_index, index), ...)]
        turned = tensor if rule.axes is None else tensor.transpose(rule.axes)
        part[...] = turned.reshape(part.shape)
    return array


def to_theirs(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Undoes `to_ours`, bit for bit, for rules whose places are whole arrays.

    Args:
      arrays: ours, by our names.
      rules: the first whose place fits counts.
    Raises:
      WeightsError: if they have no place for one of ours.
    """
    tensors = {}
    for ours, array in arrays.items():
        pairs = ((rule, re.fullmatch(_pattern(rule.ours), ours)) for rule in rules if rule.ours)
        rule, match = next((pair for pair in pairs if pair[1]), (None, None))
        if match is None:
            raise WeightsError(f"that layout has no place for our {ours}")
        turned = array if rule.axes is None else array.transpose(np.argsort(rule.axes))
        theirs = rule.theirs.format(**match.groupdict())
        tensors[theirs] = np.ascontiguousarray(turned)
    return tensors


def _pattern(template: str) -> str:
    pattern = re.escape(template).replace(re.escape("{*}"), ".*")
    return re.sub(r"\\{([ij])\\}", r"(?P<\1>0|[1-9][0-9]{0,5})", pattern)


def _place(template: str, numbers: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Our name, and the parts of the index: numbers and ":"."""
    name, _, index = template.format(**numbers).rstrip("]").partition("[")
    return name, tuple(index.split(",")) if index else ()


def _numpy_index(part: str) -> int | slice:
    return slice(None) if part == ":" else int(part)


def _misfit(tensor, axes, shape, index) -> str | None:
    """What is wrong with a tensor, if it does not fit the part of an array of this shape."""
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
        return f"holds {tensor.dtype}, wanted floating-point numbers"
    has = list(tensor.shape)
    pairs = list(zip(index, shape, strict=False))
    if len(index) > len(shape) or any(at != ":" and int(at) >= size for at, size in pairs):
        return f"has no place: ours is {list(shape)}"
    wanted = [size for at, size in pairs if at == ":"] + list(shape[len(index) :])
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
