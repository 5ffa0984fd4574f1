"""Frozen dataclasses inside each other, as nested tables of a TOML text; their type hints say what a field takes."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from calque.errors import SpecError
from calque.run.fields import Check, choice, require, shown, toml_string

KIND = "kind"  # the field of a table that names its class, where several may stand there

Piece = TypeVar("Piece")


def check_fields(piece: object, **checks: Check) -> None:
    """Checks each field of a dataclass: by `checks`, and by its type hint where that has words or other dataclasses.

    Raises:
        SpecError: a value that its field does not take; the class and the field are named.
    """
    name = type(piece).__name__
    for field, hint in get_type_hints(type(piece)).items():
        value, classes = getattr(piece, field), _classes(hint)
        if field in checks:
            checks[field](f"{name}.{field}", value)
        elif get_origin(hint) is Literal:
            choice(*get_args(hint))(f"{name}.{field}", value)
        elif classes:
            optional = NoneType in get_args(hint)
            rule = " or ".join([each.__name__ for each in classes] + ["None"] * optional)
            require(type(value) in classes or (optional and value is None), f"{name}.{field}", f"of {rule}", value)


def to_toml(piece: object, words: Mapping[type, str]) -> str:
    """A dataclass as TOML; fields that are None are left out.

    Args:
        words: the classes among which a table names its own, by a field "kind".
    """
    return "\n".join([*_lines(piece, "", words), ""])


def _lines(piece: object, path: str, words: Mapping[type, str]) -> list[str]:
    values = {field.name: getattr(piece, field.name) for field in fields(piece)}  # type: ignore[arg-type]  # a dataclass
    lines = [
        f"{name} = {_toml(value)}" for name, value in values.items() if value is not None and not is_dataclass(value)
    ]
    hints = get_type_hints(type(piece))
    for name, value in values.items():
        if is_dataclass(value):
            inner = f"{path}.{name}".lstrip(".")
            kind = [f'{KIND} = "{words[type(value)]}"'] if len(_classes(hints[name])) > 1 else []
            lines += ["", f"[{inner}]", *kind, *_lines(value, inner, words)]
    return lines


def _toml(value: object) -> str:
    return toml_string(value) if isinstance(value, str) else repr(value)


def from_table(cls: type[Piece], table: Mapping[str, Any], words: Mapping[type, str], path: str = "") -> Piece:
    """The dataclass that a table of a TOML text holds. Every field must be there, but for those that may be None.

    Args:
        path: of the table, for errors; empty for the whole text.

    Raises:
        SpecError: an unknown or missing field, or a value that its field does not take; the table is named.
    """
    hints, place = get_type_hints(cls), f"the table [{path}]" if path else "the file"
    optional = {name for name, hint in hints.items() if NoneType in get_args(hint)}
    unknown, missing = sorted(set(table) - set(hints)), sorted(set(hints) - set(table) - optional)
    if unknown or missing:
        rule = f"has the fields {', '.join(hints)}" if hints else f"has no field but {KIND}"
        found = {"Unknown": unknown, "Missing": missing}
        told = " ".join(f"{word}: {', '.join(names)}." for word, names in found.items() if names)
        raise SpecError(f"{place} {rule}. {told}")
    values: dict[str, Any] = dict.fromkeys(optional)
    for name, value in table.items():
        classes = _classes(hints[name])
        values[name] = _inner(classes, value, words, f"{path}.{name}".lstrip(".")) if classes else value
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from error


def _inner(classes: tuple[type, ...], value: object, words: Mapping[type, str], path: str) -> object:
    """The dataclass in a table that stands where one of the `classes` may."""
    if not isinstance(value, dict):
        raise SpecError(f"{path} must be a table [{path}]. Got {shown(value)}.")
    table = dict(value)
    cls = classes[0]
    if len(classes) > 1:
        known = {words[each]: each for each in classes}
        if KIND not in table:
            raise SpecError(f"the table [{path}] needs the field {KIND}, one of {', '.join(known)}.")
        kind = table.pop(KIND)
        choice(*known)(f"{path}.{KIND}", kind)
        cls = known[kind]
    return from_table(cls, table, words, path)


def _classes(hint: object) -> tuple[type, ...]:
    """The dataclasses among which a field's hint leaves the choice; none where it is a plain value."""
    hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(each for each in hints if isinstance(each, type) and is_dataclass(each))
