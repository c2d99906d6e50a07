"""Loads a reward function by name, reads its signature and checks its answer."""

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from rlhf.data.tokenization import Text
from rlhf.errors import InputError, excerpt
from rlhf.isolation.worker_process import Described

SCORE_LIMIT = 1e9
"""Largest allowed size of a score. In float32, larger ones leave no digits for the differences that training needs."""


# --- by name ---


def load_reward_function(name: str, setting: str = "reward_functions") -> Callable[..., Any]:
    """Loads "path/to/file.py:function" or "module.path:function", which executes that file or module."""
    source, colon, function_name = name.rpartition(":")
    if not colon or not source or not function_name:
        raise InputError(f"{setting}={name!r}: write file.py:function or module.path:function.")
    module = _from_file(source, f"{setting}={name!r}") if source.endswith(".py") else _import(source, name, setting)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, function_name):
        close = get_close_matches(function_name, public, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(public) or 'no functions'}."
        raise InputError(f"{setting}={name!r}: {source} has no function {function_name!r}. {hint}")
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(
            f"{setting}={name!r}: {function_name} is {type(function).__name__}, not a function. Name one of "
            f"{', '.join(public) or 'its functions'}."
        )
    return function


def _from_file(source: str, where: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"{where}: there is no file {path}. Check the path; it is relative to the current directory.")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}_{abs(hash(path)):x}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{where}: {path} cannot be imported. Give a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up modules by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{where}: running {path} raised {type(error).__name__}: {error}. Repair the file.") from error
    return module


def _import(source: str, name: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise InputError(
            f"{setting}={name!r}: importing {source} raised {type(error).__name__}: {error}. Install the module, or "
            "name the file instead: path/to/file.py:function."
        ) from error


# --- its signature ---


@dataclass(frozen=True)
class Signature:
    """Which keywords a function takes. `prompt_ids` is passed only to functions that name it, not to `**kwargs`."""

    named: frozenset[str]
    required: tuple[str, ...]
    takes_all: bool
    is_async: bool

    def select(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        takes_all = self.takes_all
        return {k: v for k, v in keywords.items() if k in self.named or (takes_all and k != "prompt_ids")}


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of `function`; InputError if it cannot be called with keywords."""
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return Signature(frozenset(), (), True, is_async)
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(
                f"Reward function {name_of(function)!r} takes {parameter.name!r} by position only, but rewards are "
                "called with keywords. Remove the / from its signature."
            )
    usual = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Signature(
        named=frozenset(p.name for p in usual),
        required=tuple(p.name for p in usual if p.default is p.empty),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
        is_async=is_async,
    )


def name_of(function: Callable[..., Any]) -> str:
    """The name of `function` in logs and messages."""
    function = getattr(function, "func", function)  # functools.partial
    name = getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
    return str(name).replace("/", "_")


# --- its answer ---


def check_scores(answer: Any, num_rows: int, name: str, prompts: Sequence[Text]) -> list[float | None]:
    """Checks a reward function's answer: a list, tuple, 1-D tensor or array with a number or None per row.

    Booleans count as 1 and 0. NaN, infinities, magnitudes above `SCORE_LIMIT` and all other types raise InputError.
    """
    wanted = f"Return a list with one number, or None, for each of the {num_rows} completions."
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().to("cpu", torch.float64).numpy()
    if isinstance(answer, np.ndarray) and answer.ndim == 1:
        answer = answer.tolist()
    if isinstance(answer, np.ndarray):
        raise InputError(f"Reward function {name!r} returned an array of shape {answer.shape}. {wanted}")
    if isinstance(answer, Described):
        raise InputError(f"Reward function {name!r} returned {answer.kind} {answer}. {wanted}")
    if not isinstance(answer, list | tuple):
        raise InputError(f"Reward function {name!r} returned {type(answer).__name__} {excerpt(answer)}. {wanted}")
    if len(answer) != num_rows:
        raise InputError(f"Reward function {name!r} returned {len(answer)} scores for {num_rows} completions. {wanted}")
    scores = []
    for row, value in enumerate(answer):
        score = as_float(value)
        if value is not None and (score is None or not abs(score) <= SCORE_LIMIT):
            raise InputError(
                f"Reward function {name!r} returned {excerpt(value)} for row {row} (prompt {excerpt(prompts[row])}). "
                f"Return a finite number of at most {SCORE_LIMIT:g} in size, or None to leave the row out."
            )
        scores.append(score)
    return scores


def as_float(value: Any) -> float | None:
    """Plain and numpy numbers, booleans and 0-d tensors as a float; None for everything else."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real | np.bool_):
        return None
    try:
        return float(value)
    except OverflowError:  # an int of 400 digits
        return math.inf
