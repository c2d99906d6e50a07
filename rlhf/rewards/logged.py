"""What reward functions report through `log_extra` and `log_metric`: checked when they say it, before it is learnt from.

Both become lines of JSON. What JSON lacks is refused rather than written as some text that nobody can read back.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import torch

from rlhf.errors import InputError, excerpt
from rlhf.rewards.functions import as_float

DEPTH = 32
"""Most levels of lists and dictionaries in one value."""
OWN_COLUMNS = ("step", "row", "prompt", "completion", "score", "advantage")
"""Columns of completions.jsonl that the trainer writes itself, besides rewards/NAME."""


class Log:
    """Collects what functions report during one batch."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.columns: dict[str, list[Any]] = {}
        self.metrics: dict[str, tuple[float, float]] = {}
        """"custom/<name>" -> (sum, count)."""
        self._said_by: dict[str, tuple[str, str]] = {}  # column or metric -> function, and the name as it wrote it

    def tools(self, function: str) -> dict[str, Callable[[Any, Any], None]]:
        """`log_extra` and `log_metric` for one reward function."""
        return {"log_extra": partial(self._extra, function), "log_metric": partial(self._metric, function)}

    def _extra(self, function: str, column: Any, values: Any) -> None:
        where = f"Reward function {function!r}: log_extra({excerpt(column)})"
        rows = checked_column(function, column, values)
        if len(rows) != self.num_rows:
            raise InputError(f"{where} got {len(rows)} values. Give one for each of {self.num_rows} rows.")
        if column in OWN_COLUMNS or column.startswith("rewards/"):
            raise InputError(f"{where}: the trainer writes a column of that name itself. Choose another name.")
        other, _ = self._said_by.setdefault(column, (function, column))
        if other != function:
            raise InputError(f"{where}: {other!r} has logged a column of that name too. Choose another name.")
        self.columns[column] = rows

    def _metric(self, function: str, name: Any, value: Any) -> None:
        number = checked_metric(function, name, value)
        metric = _metric_name(name)
        _, other = self._said_by.setdefault(metric, (function, name))
        if other != name:
            raise InputError(
                f"Reward function {function!r}: log_metric({name!r}) is written as {metric}, and so is {other!r}. Choose "
                "another name."
            )
        total, count = self.metrics.get(metric, (0.0, 0.0))
        self.metrics[metric] = (total + number, count + 1)


def checked_column(function: str, column: Any, values: Any) -> list[Any]:
    """The values of `log_extra` as JSON holds them: numbers (of numpy and torch too), text, None, lists, dictionaries.

    Raises InputError that names the function, the column, and the first value that cannot be written.
    """
    where = f"Reward function {function!r}: log_extra({excerpt(column)})"
    _check_name(where, column)
    if isinstance(values, str | bytes | Mapping | Set):
        raise InputError(
            f"{where} got {type(values).__name__} {excerpt(values)}. Give a list with one value for each row."
        )
    if isinstance(values, torch.Tensor | np.ndarray) and values.ndim == 1:
        values = values.tolist()
    rows = []
    for row, value in enumerate(values):
        try:
            rows.append(as_json(value))
        except Unwritable as problem:
            raise InputError(
                f"{where} got for row {row} what JSON cannot hold: {problem}. Give None, finite numbers, text, or lists "
                "and dictionaries of these."
            ) from None
    return rows


def checked_metric(function: str, name: Any, value: Any) -> float:
    """The value of `log_metric` as a float. Raises InputError that names the function, the metric and a bad value."""
    where = f"Reward function {function!r}: log_metric({excerpt(name)})"
    _check_name(where, name)
    number = as_float(value)
    if number is None or not math.isfinite(number):
        raise InputError(f"{where} got {excerpt(value)}. Give a finite number.")
    return number


class Unwritable(ValueError):
    """Says what about a value JSON cannot hold."""


def as_json(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A copy of `value` that JSON holds and gives back, with numbers of numpy and torch as Python's.

    inside: identities of the lists and dictionaries that `value` lies in. Raises Unwritable.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and _is_text(value):
        return str.__str__(value)  # of a subclass, such as an enumeration, the text itself
    if isinstance(value, int) and value.bit_length() < 4096:  # Python refuses to print longer ones
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(number := as_float(value) or 0.0):
        return number
    if not isinstance(value, list | tuple | Mapping):
        raise Unwritable(f"{type(value).__name__} {excerpt(value)}")
    if id(value) in inside or len(inside) == DEPTH:
        raise Unwritable(f"a {type(value).__name__} that contains itself, or with more than {DEPTH} levels")
    inside = (*inside, id(value))
    if not isinstance(value, Mapping):
        return [as_json(item, inside) for item in value]
    for key in value:
        if not isinstance(key, str) or not _is_text(key):
            raise Unwritable(f"the key {excerpt(key)}, which is no text")
    return {str.__str__(key): as_json(item, inside) for key, item in value.items()}


def _metric_name(name: str) -> str:
    """ "accuracy" -> "custom/accuracy", with _ for each slash in its own name."""
    return f"custom/{name.removeprefix('custom/').replace('/', '_')}"


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _is_text(name) or not name.removeprefix("custom/"):
        raise InputError(f"{where}: the name must be text, and not empty. Choose another name.")


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate, which some decoders leave, cannot be written."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
