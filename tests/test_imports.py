"""Imports between the rooms of the package run one way."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "dalle_jax"

# Each room, and the rooms above it in this table that it may import.
ROOMS = {
    "cache_folder": set(),
    "compilation_cache": {"cache_folder"},
    "malloc": set(),
    "memory": set(),
    "terminal": set(),
    "image": set(),
    "text": set(),
    "precision": set(),
    "losses": set(),
    "optim": {"precision"},
    "parallel": {"precision"},
    "models": {"image", "precision"},
    "data": {"cache_folder", "image", "text"},
    "weights": {"text", "models"},
    "generate": {"memory", "image", "text", "precision", "parallel", "models"},
    "train": {"image", "text", "precision", "losses", "optim", "parallel", "models", "data"}
    | {"generate"}  # sheets and model folders come from what users call
    | {"compilation_cache", "malloc", "terminal"},
    "watch": {"train"},
    "planner": {"image", "text", "precision", "parallel", "models", "data", "generate", "train"},
    "evaluate": {"image", "text", "precision", "losses", "models", "data", "generate", "weights"},
    "serve": {"image", "generate"},
    "__init__": {"compilation_cache", "malloc", "generate"},
}
ROOMS["option_checks"] = set()
ROOMS["commands"] = set(ROOMS)
ROOMS["cli"] = set(ROOMS)
# What every room may import.
BASE = {"errors": set(), "atomic": set(), "lazy_array": set(), "extras": {"errors"}}
ROOMS = BASE | {room: below | set(BASE) for room, below in ROOMS.items()}

# Slow or large to import: a user who only generates images does not wait for them.
HEAVY = {"grain", "tensorflow_datasets", "array_record", "orbax", "optax"}
ROOMS_WITH_HEAVY = {"data", "train", "optim", "weights"}


def imports(file):
    """Dotted names that a file imports, at its head or inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: say the whole name instead of a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def all_imports():
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file, room_of(file), name.split(".")) for file in files for name in imports(file)]


def test_every_room_stands_in_the_table_below_what_it_imports():
    found = {room_of(file) for file in PACKAGE.rglob("*.py")}
    assert found - set(ROOMS) == set(), "a new room needs a line in ROOMS"
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in allowed - {room})


def test_rooms_import_only_rooms_below_them():
    backward = []
    for file, room, name in all_imports():
        if name[0] != "dalle_jax":
            continue
        # A name that is no room, as in `from dalle_jax import load`, is the package's own.
        target = name[1] if len(name) > 1 and name[1] in ROOMS else "__init__"
        if target != room and target not in ROOMS[room]:
            backward.append(f"{file.relative_to(PACKAGE)} imports {'.'.join(name)}")
    assert backward == []


def test_drawing_needs_no_training_library():
    heavy = [
        f"{file.relative_to(PACKAGE)} imports {name[0]}"
        for file, room, name in all_imports()
        if name[0] in HEAVY and room not in ROOMS_WITH_HEAVY
    ]
    assert heavy == []
