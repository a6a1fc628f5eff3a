"""What a program compiled for a TPU reads from and writes to the chip's memory, from its text.

The text is that of the optimised program. It says of each array whether it lies in memory or on the
chip, where it costs nothing, and to which tiles it is padded. Of an array in memory counts what an
instruction uses: of a large one that is sliced, the slice.
"""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_ONE = r"[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?"  # an array, without groups
_FREE = {"parameter", "constant", "iota", "bitcast", "tuple", "get-tuple-element", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}  # what reads a part of its first operand


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    shape: str
    """Of the result, with its layout."""
    operands: tuple[str, ...]
    """Names; of a parameter its number, of a constant its value."""
    attributes: str
    is_root: bool


Program = dict[str, dict[str, Instruction]]
"""The instructions of each computation, by their names."""


class Traffic(NamedTuple):
    """Bytes that an instruction moves from and to memory, in all its runs."""

    read: int
    written: int
    instruction: Instruction


def read_program(text: str) -> tuple[Program, str]:
    """All computations, and the name of the one that is the whole program."""
    program: Program = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            program[name] = {}
            entry = name if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, label, shape, kind, rest = found.groups()
            inside, attributes = _split(rest)
            literal = kind in ("parameter", "constant")
            operands = (inside,) if literal else re.findall(r"%([\w.\-]+)", inside)
            program[name][label] = Instruction(
                label, kind, shape, tuple(operands), attributes, root is not None
            )
    return program, entry


def loop_bodies(program: Program, name: str) -> list[str]:
    """The bodies of the loops in a computation."""
    loops = (x for x in program[name].values() if x.kind == "while")
    return [_called(x, "body") for x in loops]


def traffic(program: Program, name: str, times: int = 1) -> list[Traffic]:
    """What the instructions of a computation move; of a choice, all branches.

    A loop within it runs as often as the greatest number that its condition compares with.
    """
    found = []
    for line in program[name].values():
        if line.kind == "while":
            condition = program[_called(line, "condition")].values()
            numbers = [int(x.operands[0]) for x in condition if _is_number(x)]
            found += traffic(program, _called(line, "body"), times * max(numbers, default=1))
        elif line.kind == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", line.attributes.partition("metadata")[0]):
                found += traffic(program, branch, times)
        elif line.kind not in _FREE and not line.kind.endswith("-done"):
            read, written = _moved(program, name, line)
            if read or written:
                found.append(Traffic(times * read, times * written, line))
    return found


def _is_number(line):
    return line.kind == "constant" and line.operands[0].isdigit()


def size(shape: str) -> int:
    """Bytes of an array, or of several, in memory; those that lie on the chip have none.

    >>> size("bf16[33,64]{1,0:T(8,128)(2,1)}")
    10240
    >>> size("(f32[8,128]{1,0:T(8,128)S(1)}, s32[])")
    4
    """
    return sum(_array_size(*array) for array in _ARRAY.findall(shape) if array[0] in _BYTES)


def _array_size(dtype, dims, layout):
    if re.search(r"S\(\d+\)", layout):
        return 0
    dims = [int(n) for n in dims.split(",") if n]
    order, _, tiles = layout.partition(":")
    minor_first = [dims[int(i)] for i in order.split(",") if i] if order else dims[::-1]
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    if tile and dims:
        for i, n in enumerate(reversed(tile[1].split(","))):
            if i < len(minor_first):
                minor_first[i] = math.ceil(minor_first[i] / int(n)) * int(n)
    return _BYTES[dtype] * math.prod(minor_first)


def _moved(program, name, line):
    """Bytes read and written by one run of an instruction."""
    lines = program[name]
    operands = [lines[x].shape for x in line.operands]
    if line.kind in ("fusion", "async-start", "call"):
        called = _called(line, "to_apply" if line.kind == "call" else "calls")
        inner = program[called]
        read = sum(
            min(size(shape), _used(program, called, i))
            for i, shape in enumerate(operands)
            if size(shape)
        )
        (root,) = (x for x in inner.values() if x.is_root)
        results = [inner[x] for x in root.operands] if root.kind == "tuple" else [root]
        shapes = _parts(line.shape) if root.kind == "tuple" else [line.shape]
        written = sum(
            min(size(shape), _changed(inner, x)) for x, shape in zip(results, shapes, strict=True)
        )
        return read, written
    if line.kind == "copy-start":
        return size(operands[0]), size(_parts(line.shape)[0])
    if line.kind == "slice-start":
        target = _parts(line.shape)[1]
        return (size(_in_memory(target)) if size(operands[0]) else 0), size(target)
    if line.kind in _SLICES:
        part = size(_in_memory(line.shape)) if size(operands[0]) else 0
        return part + sum(map(size, operands[1:])), size(line.shape)
    if line.kind == "dynamic-update-slice":
        written = size(_in_memory(operands[1])) if size(line.shape) else 0
        return sum(map(size, operands[1:])), written
    return sum(map(size, operands)), size(line.shape)


def _used(program, name, number):
    """Bytes that a computation needs of one of its operands."""
    (parameter,) = (
        x for x in program[name].values() if x.kind == "parameter" and x.operands == (str(number),)
    )
    return _used_here(program, name, parameter)


def _used_here(program, name, value):
    total = size(_in_memory(value.shape)) if value.is_root else 0
    for line in program[name].values():
        for i, operand in enumerate(line.operands):
            if operand != value.name:
                continue
            if line.kind == "bitcast":
                total += _used_here(program, name, line)
            elif line.kind == "fusion":
                total += _used(program, _called(line, "calls"), i)
            elif line.kind in _SLICES and i == 0:
                total += size(_in_memory(line.shape))
            elif not (line.kind == "dynamic-update-slice" and i == 0):
                total += size(_in_memory(value.shape))
    return total


def _changed(inner, line):
    """Bytes of a fusion's result that it changes."""
    if line.kind == "bitcast":
        return _changed(inner, inner[line.operands[0]])
    if line.kind == "dynamic-update-slice":
        return size(_in_memory(inner[line.operands[1]].shape))
    return size(_in_memory(line.shape))


def _in_memory(shape):
    return re.sub(r"S\(\d+\)", "", shape)


def _called(line, role):
    return re.search(rf"{role}=%([\w.\-]+)", line.attributes)[1]


def _parts(shape):
    """The shapes in a tuple's; tuples within it stay."""
    return re.findall(rf"\((?:{_ONE}(?:, )?)+\)|{_ONE}", shape[1:-1])


def _split(rest):
    """What stands in an instruction's brackets, and what follows them."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""
