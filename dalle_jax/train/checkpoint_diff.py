"""How a checkpoint differs from the run that wants to go on with it.

Source: ours.
"""

import dataclasses
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree


def array_difference(saved: PyTree, wanted: PyTree) -> str | None:
    """Names the first array that only one of two trees holds, or in two shapes or dtypes."""

    def arrays(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        name = partial(jax.tree_util.keystr, simple=True, separator="/")
        # A typed key is saved as its words, so only its place in the tree can be compared.
        return {name(path): _form(x) for path, x in leaves if not name(path).startswith("rng/")}

    old, new = arrays(saved), arrays(wanted)
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            return f"{name} is {old.get(name, 'absent')} in it, {new.get(name, 'absent')} here"
    return None


def _form(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def without(settings: dict, names: Iterable[str]) -> dict:
    """Gives settings without the entries of some dotted names."""
    settings = dict(settings)
    for name in names:
        first, _, rest = name.partition(".")
        if rest and first in settings:
            settings[first] = without(settings[first], [rest])
        else:
            settings.pop(first, None)
    return settings


def defaults(config: Any) -> dict:
    """Gives the default of each field of a dataclass, and of those of dataclasses inside it.

    Args:
      config: a frozen dataclass; it says which class each of its fields has.
    """
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = defaults(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def setting_differences(saved: dict, now: dict, defaults: dict) -> list[str]:
    """Lists where settings differ from saved ones, by dotted name.

    Args:
      saved: of a checkpoint, as JSON holds them; entries that `now` lacks are ignored.
      now: of the run.
      defaults: what stands for an entry of `now` that the checkpoint is too old to have.
    """
    now, defaults = (json.loads(json.dumps(x)) for x in (now, defaults))
    return _changes(saved, now, defaults, "")


def _changes(saved: Any, now: Any, defaults: Any, name: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        defaults = defaults if isinstance(defaults, dict) else {}
        return [
            change
            for key, value in now.items()
            for change in _changes(
                saved.get(key, defaults.get(key)),
                value,
                defaults.get(key),
                f"{name}.{key}" if name else key,
            )
        ]
    return [] if saved == now else [f"{name} was {saved!r}, now {now!r}"]
