"""Helpers for settings, which are (nested) dataclasses: dotted names and a check of types."""

import dataclasses
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from typing import Any

from rlhf.errors import InputError


def dotted(
    settings: Mapping[str, Any], *, is_group: Callable[[str], bool] = lambda name: True, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in nested mappings; an empty mapping is a value.

    is_group: whether to descend into the mapping of that dotted name.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and is_group(prefix + name):
            yield from dotted(value, is_group=is_group, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_types(settings: Any) -> None:
    """Raises InputError if a field of a settings dataclass is not of its declared type. Call it first in __post_init__.

    Knows the types that settings have: numbers, text, booleans, literals, tuples and lists of these, groups (nested
    dataclasses), and unions of them with null. The command line checks types itself; a call from Python does not.
    """
    for name, hint in _hints(type(settings)).items():  # type: ignore[arg-type]
        value = getattr(settings, name)
        if not _fits(value, hint):
            raise InputError(f"{name} must be {_in_words(hint)}, got {value!r}.")


@cache
def _hints(settings: Hashable) -> dict[str, Any]:
    """Name -> declared type, of the fields of a settings class."""
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}  # type: ignore[arg-type]


def _fits(value: Any, hint: Any) -> bool:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is typing.Literal:
        return any(value is member or (type(value) is type(member) and value == member) for member in members)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(item, members[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _in_words(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, members))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(member) for member in members)
    if origin in (tuple, list):
        return f"a sequence, each {_in_words(members[0])}"
    if hint is type(None):
        return "null"
    simple = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return simple.get(hint, f"a {getattr(hint, '__name__', hint)}")
