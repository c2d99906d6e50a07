"""Rows, prompts and completions made in one line."""

from datasets import Dataset

from rlhf.data.prompts import PromptDataset
from rlhf.data.supervised import tokenize_completions
from tests.data.texts import (
    PLAIN_TEMPLATE,
    make_tokenizer,
)

CHAT = make_tokenizer(template=PLAIN_TEMPLATE)


def rows_of(*values, column="prompt"):
    return Dataset.from_list([{column: value} for value in values])


def prompts_of(rows, tokenizer=None, **options):
    return PromptDataset.build(rows, tokenizer or make_tokenizer(), **({"max_prompt_tokens": 64} | options))


def assert_says(error, *parts):
    for part in parts:
        assert part in str(error.value)


def completions_of(rows, tokenizer=None, max_tokens=64):
    return tokenize_completions(Dataset.from_list(rows), tokenizer or make_tokenizer(), max_tokens=max_tokens)
