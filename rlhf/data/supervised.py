"""Tokenises rows for the supervised stages: completions for fine-tuning, preference pairs for reward models."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf.data.rows import Row, RowProblems, checked, completion_row, preference_row, require_columns
from rlhf.data.tokenization import Encoder, text_problem
from rlhf.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def tokenize_completions(rows: "Dataset", tokenizer: Any, *, max_tokens: int, setting: str = "dataset") -> "Dataset":
    """For supervised fine-tuning: `input_ids` (prompt, completion, one EOS) and `labels`, which are -100 on the prompt.

    Rows longer than `max_tokens` are dropped and counted in a warning; InputError if none is left.
    """
    require_columns(rows.column_names, [("prompt", "completion"), ("messages",)], setting, "fine-tuning")
    pairs = _encode_rows(rows, tokenizer, completion_row, setting)
    lines = [
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for ((prompt, completion),) in pairs
    ]
    return _within(lines, max_tokens, setting)


def tokenize_preferences(rows: "Dataset", tokenizer: Any, *, max_tokens: int, setting: str = "dataset") -> "Dataset":
    """For reward models: `chosen_ids` and `rejected_ids`, each prompt, completion and one EOS.

    Pairs with a side longer than `max_tokens` are dropped and counted in a warning; InputError if none is left.
    """
    require_columns(rows.column_names, [("chosen", "rejected")], setting, "a preference data set")
    pairs = _encode_rows(rows, tokenizer, preference_row, setting)
    lines = [{"chosen_ids": a + b, "rejected_ids": c + d} for (a, b), (c, d) in pairs]
    return _within(lines, max_tokens, setting)


def _encode_rows(
    rows: "Dataset", tokenizer: Any, read: Callable[[Row], tuple[Any, ...]], setting: str
) -> list[list[tuple[list[int], list[int]]]]:
    """For each row, (prompt ids, completion ids) of each completion that `read` returns after the prompt."""
    rows = checked(rows, setting)
    encoder = Encoder(tokenizer)
    problems = RowProblems(setting, "rows", len(rows))
    encoded: list[list[tuple[list[int], list[int]]]] = []
    for i, row in enumerate(rows):
        try:
            prompt, *completions = read(row)
            problem = next((p for p in map(text_problem, (prompt, *completions)) if p), None)
            if problem is None:
                encoded.append([encoder.pair(prompt, completion) for completion in completions])
        except InputError as error:
            problem = str(error)
        if problem:
            problems.add(i, problem)
    problems.check()
    return encoded


def _within(lines: list[dict[str, list[int]]], max_tokens: int, setting: str) -> "Dataset":
    sizes = [max(map(len, line.values())) for line in lines]
    kept = [line for line, size in zip(lines, sizes, strict=True) if size <= max_tokens]
    if not kept:
        raise InputError(
            f"{setting}: all {len(lines)} rows are longer than max_tokens={max_tokens} (the shortest has {min(sizes)} "
            "tokens). Raise max_tokens."
        )
    if len(kept) < len(lines):
        dropped = len(lines) - len(kept)
        logger.warning("%s: dropped %d of %d rows longer than %d tokens", setting, dropped, len(lines), max_tokens)
    from datasets import Dataset

    return Dataset.from_list(kept)
