"""The composition suite on emoji: which cases there are, and the questions about them.

Family "style": a concept that training knows from the other designer alone. Family "cell": a role,
gender and skin tone, each known, that training never saw together, in either style. Each held-out
case has a seen one beside it that differs as little as possible, for comparison. Source: ours.
"""

import collections
import hashlib
from collections.abc import Callable

from dalle_jax.data.emoji_svgs import list_emoji, role
from dalle_jax.data.paraphrase import official_names, styled_caption
from dalle_jax.data.sources import DataSource, Record
from dalle_jax.evaluate.composition import Case

_Cell = tuple[str, str, str, tuple[str, ...]]  # style, role, gender, tones

FAMILIES = {"style": "heldout_style", "cell": "heldout_cell"}
"""Families and the splits that hold their images."""


def emoji_cases(open_split: Callable[[str], DataSource]) -> list[Case]:
    """Lists the cases, each held-out one before its seen partner, if it has one.

    Args:
      open_split: gives a split of the emoji by name, see `data.emoji`.
    Returns:
      Cases of both families.
    """
    table = _Table()
    seen = _records(open_split("train"))
    cases = []
    for family, split in FAMILIES.items():
        for record in _records(open_split(split)).values():
            partner = table.partner(family, record, seen)
            pair = (record,) if partner is None else (record, partner)
            cases += [
                Case(
                    id=one["id"],
                    family=family,
                    held_out=one is record,
                    caption=styled_caption(official_names(one)[0], one["style"]),
                    alternatives=table.alternatives(family, one),
                )
                for one in pair
            ]
    return cases


AXES = {
    "style": {"style": (0,), "concept": (1, 2), "tone": (3,)},
    "cell": {"style": (0,), "role": (1,), "gender": (2,), "tone": (3,)},
}
"""For each family its axes, and which parts of a cell (style, role, gender, tones) they change."""


class _Table:
    """All named drawings as cells."""

    def __init__(self):
        self._cell: dict[str, _Cell] = {}
        # For each axis (as the parts it changes) and whatever else a cell is: the captions.
        self._captions = collections.defaultdict(dict)
        named, genders = {}, collections.defaultdict(set)
        for drawing in list_emoji():
            concept, tones = drawing.cell
            cell = (drawing.style, *role(concept), tones)
            self._cell[drawing.id], named[cell] = cell, drawing.name
            genders[cell[1]].add(cell[2])
        # Anything is a role of the gender "person"; people are those that have another one too.
        self._people = {person for person, found in genders.items() if len(found) > 1}
        for family, axes in AXES.items():
            for cell, name in named.items():
                if family == "style" or cell[1] in self._people:
                    for axis, parts in axes.items():
                        key = family, axis, _rest(cell, parts)
                        self._captions[key][styled_caption(name, cell[0])] = None

    def partner(self, family: str, record: Record, seen: dict[str, Record]) -> Record | None:
        """A training record of the same style: of the same role, or at least as toned."""
        style, person, _, tones = self._cell[record["id"]]

        def is_near(cell):
            if family == "cell":
                return cell[:2] == (style, person)
            is_person, was_person = cell[1] in self._people, person in self._people
            return (cell[0], cell[3], is_person) == (style, tones, was_person)

        near = [other for other in seen if is_near(self._cell[other])]
        return seen[min(near, key=lambda other: _lot(record["id"] + other))] if near else None

    def alternatives(self, family: str, record: Record) -> dict[str, tuple[str, ...]]:
        """For each axis the captions of cells that differ in it alone and are called otherwise."""
        cell = self._cell[record["id"]]
        own = {styled_caption(name, record["style"]) for name in official_names(record)}
        found = {
            axis: tuple(c for c in self._captions[family, axis, _rest(cell, parts)] if c not in own)
            for axis, parts in AXES[family].items()
        }
        return {axis: captions for axis, captions in found.items() if captions}


def _rest(cell: _Cell, parts: tuple[int, ...]) -> tuple:
    return tuple(part for i, part in enumerate(cell) if i not in parts)


def _records(source: DataSource) -> dict[str, Record]:
    return {record["id"]: record for record in (source[i] for i in range(len(source)))}


def _lot(text: str) -> str:
    return hashlib.sha256(f"dalle_jax composition {text}".encode()).hexdigest()
