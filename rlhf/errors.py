"""The two errors a user can meet, and the check that settings are of their declared types.

Commands print an error's message alone; everything else is a defect of ours.
"""

from typing import Any


class InputError(ValueError):
    """Bad input: a setting, a data row, a tokenizer, a model, a reward function. Names it, its value and the remedy."""


class TrainingError(RuntimeError):
    """A run that must not go on (a non-finite loss or gradient, an inconsistent model). Says at which step and where."""


def excerpt(value: Any, limit: int = 60) -> str:
    """`repr(value)` shortened in the middle."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
