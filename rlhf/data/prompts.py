"""Prompts of a data set as token ids, in the order in which training visits them.

Row formats, each with plain strings or with conversations (lists of `{"role", "content"}` messages):

    prompt-only        prompt                     (or messages: those before a final assistant turn)
    prompt-completion  prompt, completion         (or messages: the final assistant turn is the completion)
    preference         prompt, chosen, rejected   (without prompt: the messages that both conversations begin with)

All other columns stay with their prompt and reach the reward functions. Rows are counted from 0 in every message.
`load_rows` (rows.py) reads files, directories and the hub; tokenization.py turns text into ids; supervised.py tokenises
completions and preference pairs.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from rlhf.core.random import DATA_ORDER, permutation
from rlhf.data.rows import (
    Row,
    RowProblems,
    Table,
    checked,
    prompt_reader,
)
from rlhf.data.tokenization import Encoder, Message, Text, text_problem
from rlhf.errors import InputError, excerpt

TooLong = Literal["error", "drop", "truncate_left"]


# --- prompts to sample from ---


@dataclass(frozen=True)
class Prompt:
    """One prompt. `ids`: the policy's input, without padding. `prompt`: what the user wrote, even if `ids` is cut;
    reward functions get this. `columns`: the row's other columns, for example a reference answer."""

    ids: list[int]
    prompt: Text
    columns: Row


class PromptDataset:
    """Prompts as token ids, and the order in which training visits them. Made by `PromptDataset.build`."""

    def __init__(self, rows: Table, kept: list[int], ids: list[list[int]], truncated: int, setting: str) -> None:
        self._rows = rows
        self._kept = kept
        self._ids = ids
        self._source, self._read = prompt_reader(rows.column_names, setting)
        self.dropped = len(rows) - len(kept)
        self.truncated = truncated

    @classmethod
    def build(
        cls,
        rows: Table,
        tokenizer: Any,
        *,
        max_prompt_tokens: int,
        prompt_too_long: TooLong = "error",
        setting: str = "dataset",
    ) -> "PromptDataset":
        """Checks and tokenises every prompt now, so that no bad row stops a run later.

        Args:
            rows: the data set, in one of the formats above.
            tokenizer: the policy's tokenizer.
            max_prompt_tokens: length limit of a prompt, BOS and template included.
            prompt_too_long: for a longer prompt, "error" raises InputError; "drop" drops its row; "truncate_left" cuts
                the beginning of plain text (BOS stays), and drops the first turns of a conversation, up to a user turn
                (system messages stay). Template tokens are never cut.
            setting: the name of the data set in messages.

        Raises:
            InputError: prompts are empty, None or not text (names their rows), too long, or none is left.
        """
        if max_prompt_tokens < 1 or prompt_too_long not in ("error", "drop", "truncate_left"):
            raise InputError(
                f"max_prompt_tokens={max_prompt_tokens}, prompt_too_long={prompt_too_long!r}: use at least 1 token and "
                "one of error, drop, truncate_left."
            )
        rows = checked(rows, setting)
        encoder = Encoder(tokenizer)
        prompts, ids = _encode_prompts(rows, encoder, setting)
        long = [i for i, tokens in enumerate(ids) if len(tokens) > max_prompt_tokens]
        if prompt_too_long == "error":
            _refuse_long(ids, long, max_prompt_tokens, setting)
        elif prompt_too_long == "truncate_left":
            _truncate(ids, prompts, long, encoder, max_prompt_tokens, setting)
            return cls(rows, list(range(len(rows))), ids, len(long), setting)
        kept = [i for i, tokens in enumerate(ids) if len(tokens) <= max_prompt_tokens]
        if not kept:
            raise InputError(
                f"{setting}: all {len(rows)} prompts are longer than max_prompt_tokens={max_prompt_tokens}, so that "
                "none is left. Raise max_prompt_tokens or set prompt_too_long=truncate_left."
            )
        return cls(rows, kept, [ids[i] for i in kept], 0, setting)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:
        row = self._rows[self._kept[index]]
        columns = {name: value for name, value in row.items() if name != self._source}
        return Prompt(self._ids[index], self._read(row), columns)

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(map(len, self._ids))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all ids in order: equal in every process for the same data, tokenizer and limits."""
        digest = hashlib.sha256()
        for ids in self._ids:
            digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
        return digest.hexdigest()

    @property
    def content_fingerprint(self) -> str:
        """SHA-256 over what reward functions get: the prompts as they were written, and all other columns."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            prompt = self[i]
            given = [prompt.prompt, prompt.columns]
            try:
                text = json.dumps(given, sort_keys=True, default=_told)
            except TypeError:  # keys of several types, which have no order
                text = _told(given)
            digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def step_indices(self, cursor: int, count: int, seed: int) -> list[int]:
        """Indices of the prompts at positions `cursor` to `cursor + count - 1` of the run.

        Position p lies in epoch p // len, and each epoch is its own permutation of all prompts: a pure function of
        (seed, p), so that there is no state to save and it does not matter how steps or processes share the positions.
        """
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor and count must not be negative, got {cursor} and {count}")
        positions = (divmod(p, len(self)) for p in range(cursor, cursor + count))
        return [_epoch_order(len(self), seed, epoch)[offset] for epoch, offset in positions]


def _told(value: Any) -> str:
    """A value that JSON lacks, as text that is the same in every process."""
    if hasattr(value, "tolist"):  # arrays and tensors
        return _told(value.tolist())
    if hasattr(value, "tobytes"):  # pictures
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_told(key)}: {_told(item)}' for key, item in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_told, value)))}}}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return permutation(size, seed, DATA_ORDER, epoch).tolist()


def _encode_prompts(rows: Table, encoder: Encoder, setting: str) -> tuple[list[Text], list[list[int]]]:
    """All prompts and their ids; InputError names the rows that are empty, not text, or refused by the template."""
    _, read = prompt_reader(rows.column_names, setting)
    problems = RowProblems(setting, "prompts", len(rows))
    prompts, texts = [], []
    for i, row in enumerate(rows):
        try:
            prompt = read(row)
            problem = text_problem(prompt) or ("an empty prompt" if prompt == "" else None)
            if problem is None:
                prompts.append(prompt)
                texts.append(encoder.text(prompt))
        except InputError as error:
            problem = str(error)
        if problem:
            problems.add(i, problem)
    problems.check()
    ids = encoder.encode(texts)
    for i, tokens in enumerate(ids):
        if len(tokens) <= len(encoder.prefix):
            problems.add(i, f"{excerpt(prompts[i])} gives no tokens")
    problems.check()
    return prompts, ids


def _refuse_long(ids: list[list[int]], long: list[int], limit: int, setting: str) -> None:
    if long:
        longest = max(long, key=lambda i: len(ids[i]))
        raise InputError(
            f"{setting}: {len(long)} of {len(ids)} prompts are longer than max_prompt_tokens={limit} (first: row "
            f"{long[0]}; longest: row {longest} with {len(ids[longest])} tokens; rows count from 0). "
            "Raise max_prompt_tokens or set prompt_too_long to drop or truncate_left."
        )


def _truncate(
    ids: list[list[int]], prompts: list[Text], long: list[int], encoder: Encoder, limit: int, setting: str
) -> None:
    """Cuts the ids of the prompts with indices `long` to at most `limit` tokens, from the left, in place."""
    problems = RowProblems(
        setting, "prompts", len(ids), f"Raise max_prompt_tokens={limit} or set prompt_too_long=drop."
    )
    for i in long:
        prompt = prompts[i]
        prefix = encoder.prefix
        if isinstance(prompt, list):
            candidates = (encoder.prompts([messages])[0] for messages in _shorter(prompt))
            shorter = next((tokens for tokens in candidates if len(tokens) <= limit), [])
        else:
            shorter = prefix + ids[i][len(ids[i]) - limit + len(prefix) :] if limit > len(prefix) else []
        if not shorter:
            problems.add(i, f"its last user turn alone is longer than {limit} tokens")
        ids[i] = shorter
    problems.check()


def _shorter(messages: list[Message]) -> Iterator[list[Message]]:
    """Ever shorter versions of the conversation: system messages, then its turns from a later user turn on."""
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    for start in range(1, len(turns)):
        if turns[start]["role"] == "user":
            yield system + turns[start:]
