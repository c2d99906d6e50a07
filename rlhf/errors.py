"""The two errors that a user can meet, and `excerpt`, for their messages.

Commands print only the message of these errors; any other exception is a bug in rlhf.
"""

from typing import Any


class InputError(ValueError):
    """Bad input: a setting, a data row, a tokenizer, a model, a reward function. The message names it, its value and
    the remedy."""


class TrainingError(RuntimeError):
    """A run that must not go on (a non-finite loss or gradient, an inconsistent model). The message says where and when."""


def excerpt(value: Any, limit: int = 60) -> str:
    """`repr(value)` shortened in the middle. Of any value: a user's repr may raise, and that of deep nesting does."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(error).__name__} in its repr>"
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
