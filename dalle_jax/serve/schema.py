"""JSON objects to dataclasses, and dataclasses to JSON Schema: a field is described once.

A field's type, its default and the text below it are all that there is to say about it.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dalle_jax.errors import UserError

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_NOUNS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_PYTHON_TYPES = {str: str, int: int, float: (int, float), bool: bool}


def read_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the fields of a dataclass from a JSON object and checks their types.

    Args:
      cls: the dataclass.
      values: the object; other entries are left alone.
    Returns:
      What can be given to the dataclass.
    Raises:
      UserError: if a field is missing or has another type.
    """
    fields = {}
    for field, annotation in _annotated(cls):
        if field.name in values:
            fields[field.name] = _checked(field.name, values[field.name], annotation)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{field.name} is missing; it must be {_noun(annotation)}")
    return fields


def check_names(values: Mapping[str, Any], allowed: typing.Collection[str]) -> None:
    """Raises a UserError for a name that is not allowed, with the one that was perhaps meant."""
    for name in values:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(allowed)}"
            raise UserError(f"{name!r} is not known; {meant}")


def json_schema(cls: type) -> dict[str, Any]:
    """Describes the JSON object that `read_fields` takes, with the texts of the fields."""
    texts = field_texts(cls)
    properties, required = {}, []
    for field, annotation in _annotated(cls):
        schema = _schema_of(annotation)
        if field.default is dataclasses.MISSING:
            required.append(field.name)
        else:
            schema["default"] = field.default
        properties[field.name] = schema | {"description": texts[field.name]}
    return {"type": "object", "properties": properties, "required": required}


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, in one line."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _annotated(cls):
    annotations = typing.get_type_hints(cls)
    return [(field, annotations[field.name]) for field in dataclasses.fields(cls)]


def _alternatives(annotation):
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _schema_of(annotation) -> dict[str, Any]:
    kinds = []
    for kind in _alternatives(annotation):
        if typing.get_origin(kind) is Literal:
            kinds.append({"type": "string", "enum": list(typing.get_args(kind))})
        else:
            kinds.append({"type": "null" if kind is type(None) else _JSON_TYPES[kind]})
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _checked(name, value, annotation):
    for kind in _alternatives(annotation):
        if kind is type(None):
            if value is None:
                return value
        elif typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif isinstance(value, bool) == (kind is bool) and isinstance(value, _PYTHON_TYPES[kind]):
            try:
                return kind(value)
            except OverflowError:  # an int beyond all floats
                break
    raise UserError(f"{name} is {value!r:.100}, but must be {_noun(annotation)}")


def _noun(annotation) -> str:
    nouns = []
    for kind in _alternatives(annotation):
        if kind is type(None):
            nouns.append("null")
        elif typing.get_origin(kind) is Literal:
            nouns += [repr(value) for value in typing.get_args(kind)]
        else:
            nouns.append(_NOUNS[kind])
    return " or ".join(nouns)
