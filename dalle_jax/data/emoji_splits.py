"""Who trains and who is held out: the splits of the emoji, the same on every machine.

A *family* is the set of concepts that must stay together: those that share an image or a name, or
that are the person, man and woman of one role. Other words are those of `data/emoji_svgs.py`.
"""

import collections
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from dalle_jax.data.emoji_svgs import PACKAGES, TONES, Cell, EmojiImage, role
from dalle_jax.data.record import SourceError

SPLITS = ("train", "validation", "heldout_style", "heldout_cell")

_VALIDATION_SHARE = 0.05  # of the families
_HELDOUT_STYLE_SHARE = 0.10  # of the concepts that both styles draw


def assign_splits(images: list[EmojiImage]) -> np.ndarray:
    """Names the split of each image.

    Choices go by a hash of the concept, so they depend on nothing but the set itself. Validation
    takes whole families. Of each remaining role that both styles draw in full (person, man, woman
    x six tones), one cell is held out in both styles, with any cell that shares its image. Of
    the concepts outside such roles, some lose one style.
    """
    cells = {(d.style, *d.cell): i for i, p in enumerate(images) for d in p.svgs}
    roles = _full_roles(cells)
    families = _families(images, roles)
    order = sorted(set(families.values()), key=_lot)
    validation = set(order[: round(_VALIDATION_SHARE * len(order))])
    sides = np.full(len(images), "train", dtype=object)

    in_grid = set()
    for person, grid in sorted(roles.items()):
        family = families[person]
        in_grid.add(family)
        if family not in validation:
            for first in sorted(grid, key=lambda cell: _lot(f"cell {cell}")):
                held = _same_image(first, cells, images)
                if held <= grid:  # else it would pull in other concepts, as wrestlers do
                    together = [cells[style, *cell] for style in PACKAGES for cell in held]
                    sides[together] = "heldout_cell"
                    break

    styles = collections.defaultdict(set)
    members = collections.defaultdict(set)
    for style, concept, _ in cells:
        styles[concept].add(style)
        members[families[concept]].add(concept)
    shared = {concept for concept, drawn in styles.items() if len(drawn) == len(PACKAGES)}
    wanted = round(_HELDOUT_STYLE_SHARE * len(shared))
    hidden: dict[str, str] = {}  # family: the style it loses
    for family in sorted(set(order) - validation - in_grid, key=lambda f: _lot(f"style {f}")):
        if wanted > 0 and members[family] <= shared:
            hidden[family] = sorted(PACKAGES)[int(_lot(f"which {family}"), 16) % len(PACKAGES)]
            wanted -= len(members[family])

    for i, image in enumerate(images):
        family = families[image.svgs[0].cell[0]]
        if family in validation:
            sides[i] = "validation"
        elif hidden.get(family) == image.svgs[0].style:
            sides[i] = "heldout_style"
    _check_words(images, sides)
    return sides


def _lot(text: str) -> str:
    return hashlib.sha256(f"dalle_jax emoji {text}".encode()).hexdigest()


def _full_roles(cells: Iterable[tuple[str, str, tuple[str, ...]]]) -> dict[str, set[Cell]]:
    """Roles whose three genders and six tones (none among them) are all drawn in both styles."""
    grids = collections.defaultdict(set)
    kinds = collections.defaultdict(set)
    for style, concept, tones in cells:
        person, gender = role(concept)
        grids[person].add((concept, tones))
        kinds[person].add((style, gender, tones))
    full = len(PACKAGES) * 3 * (1 + len(TONES))
    return {person: grids[person] for person, kind in kinds.items() if len(kind) == full}


def _families(images: list[EmojiImage], roles: dict[str, set[Cell]]) -> dict[str, str]:
    """Maps each concept to the least concept of its family."""
    parent: dict[str, str] = {}

    def root(concept: str) -> str:
        while parent.setdefault(concept, concept) != concept:
            concept = parent[concept]
        return concept

    def join(group: Iterable[str]) -> None:
        roots = sorted({root(concept) for concept in group})
        for other in roots:
            parent[other] = roots[0]

    same_name = collections.defaultdict(set)
    for image in images:
        join(drawing.cell[0] for drawing in image.svgs)
        for drawing in image.svgs:
            same_name[drawing.name].add(drawing.cell[0])
    for group in same_name.values():
        join(group)
    for grid in roles.values():
        join(concept for concept, _ in grid)
    return {concept: root(concept) for concept in list(parent)}


def _same_image(first: Cell, cells: dict, images: list[EmojiImage]) -> set[Cell]:
    """The cell itself, and each cell that in either style shares an image with one of them."""
    found, waiting = set(), {first}
    while waiting:
        cell = waiting.pop()
        found.add(cell)
        for style in PACKAGES:
            if (style, *cell) in cells:
                twins = images[cells[style, *cell]].svgs
                waiting |= {drawing.cell for drawing in twins} - found
    return found


def _check_words(images: list[EmojiImage], sides: np.ndarray) -> None:
    def words(split: str) -> Iterator[str]:
        for image in itertools.compress(images, sides == split):
            yield from re.findall(r"[^\s,]+", " ".join(image.captions))

    unseen = set(words("heldout_cell")) - set(words("train"))
    if unseen:
        raise SourceError(
            f"held-out emoji use words that training never sees: {', '.join(sorted(unseen))}; "
            "pip install dalle_jax[emoji] brings the versions of emoji and em-keyboard we know"
        )
