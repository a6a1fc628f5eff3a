"""What devices send one another in a compiled program, read from its text.

The text is that after XLA's partitioner and before it optimises for one kind of device, so that it
holds for all of them. There a sum that each device keeps a part of is an all-reduce and a slice;
here it is called what accelerators make of it, a reduce-scatter.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"^ +(?:ROOT )?%([\w.\-]+) = (.*?) ({'|'.join(KINDS)})\(")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of an update that are of one kind and go along the same axes of the mesh."""

    kind: str
    """One of `KINDS`."""
    axes: tuple[str, ...]
    """Of the mesh; the devices that talk differ in their places on these."""
    members: int
    """How many devices talk with one another."""
    count: int
    """In one update."""
    array_bytes: int
    """Sizes of the whole arrays: those gathered, summed or exchanged within a device's groups."""

    @property
    def sent_bytes(self) -> float:
        """What each device sends if rings do the work: (n - 1) / n of the arrays.

        An all-reduce, which scatters sums and gathers them, sends twice that.
        """
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.array_bytes * (self.members - 1) / self.members


def collectives(text: str, mesh_shape: dict[str, int]) -> list[Collective]:
    """Lists what the devices of a partitioned program send.

    Args:
      text: HLO of the program of one device after partitioning. A loop runs as often as the
        greatest number that its condition names says, as those of `jax.lax.scan` do.
      mesh_shape: size of each axis; device ids count through it, the last axis fastest.
    Returns:
      By kind and axes, the greatest first.
    Source: ours.
    """
    programs, entry = _programs(text)
    sliced = set(re.findall(r" dynamic-slice\(%([\w.\-]+),", text))  # names are unique
    found: dict[tuple, list[int]] = {}
    for line, times in _lines(programs, entry):
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        name, result, kind = operation.groups()
        size = sum(
            _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in _ARRAY.findall(result)
        )
        axes, members = _axes(_group(line), mesh_shape)
        if kind == "reduce-scatter":
            size *= members  # its result is a part
        if kind == "all-reduce" and name in sliced:
            kind = "reduce-scatter"
        total = found.setdefault((kind, axes, members), [0, 0])
        total[0] += times
        total[1] += times * size
    listed = [
        Collective(kind=kind, axes=axes, members=members, count=count, array_bytes=size)
        for (kind, axes, members), (count, size) in found.items()
    ]
    return sorted(listed, key=lambda x: -x.sent_bytes)


def _programs(text):
    programs: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            programs[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            programs[name].append(line)
    return programs, entry


def _lines(programs, name, times=1) -> Iterator[tuple[str, int]]:
    """Every line that runs, and how often; of a choice, all branches."""
    for line in programs[name]:
        yield line, times
        if loop := _WHILE.search(line):
            condition, body = loop.groups()
            bounds = re.findall(r"constant\((\d+)\)", "\n".join(programs[condition]))
            yield from _lines(programs, body, times * max(map(int, bounds), default=1))
            continue
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [branch.strip(" %") for branch in branches[1].split(",")]
        for other in called:
            yield from _lines(programs, other, times)


def _group(line):
    """Ids of the devices of one group, in any of the three forms that XLA writes."""
    groups = re.search(r"replica_groups=(.*)", line)[1]
    if groups.startswith("{"):
        return [int(n) for n in re.match(r"\{\{([\d,]*)\}", groups)[1].split(",")]
    if groups.startswith("["):
        shape, ids = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", groups).groups()
        return _ids(ids).reshape(_numbers(shape))[0]
    sizes, ids, varied = re.match(
        r"mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", groups
    ).groups()
    sizes = [int(n) for n in re.findall(r"=(\d+)", sizes)]
    places = (_ids(ids) if ids else np.arange(math.prod(sizes))).reshape(sizes)
    varied = [int(n) for n in re.findall(r"axis_(\d+)", varied)]
    return places[tuple(slice(None) if i in varied else 0 for i in range(len(sizes)))].reshape(-1)


def _ids(text):
    """Device ids, as in [2,8]T(1,0): counted through a shape whose axes change places then."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text):
    return [int(n) for n in text.split(",")]


def _axes(group, mesh_shape):
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    axes = zip(mesh_shape, places, strict=True)
    return tuple(name for name, at in axes if len(set(at.tolist())) > 1), len(group)
