"""The embedded task: tokenizer, model and data made by code, so that the whole of RLHF runs without a network.

`write_data(folder, seed)` writes the six JSON-lines files that a user's own data would be; everything is a pure function
of the seed. The language and the hidden judge are in reviews.py; nothing trained here ever sees `gold_score`.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from reviews import gold_score, vocabulary, words, write_prompt, write_review
from small_task import check_empty, small_llama, token_ids, wrapped, write_files
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["distinct_n", "gold_score", "model_config", "tokenizer", "win_rate", "write_data"]

NUM_SFT, NUM_PREFERENCES, NUM_TEST_PREFERENCES, NUM_PROMPTS, NUM_TEST_PROMPTS = 8000, 16000, 1000, 800, 128
GOLD_TEMPERATURE = 0.5
"""Noise of the human: P(a preferred to b) = sigmoid((gold_a - gold_b) / 0.5); about 88 % of pairs go to the better."""

SFT_SETTINGS = {"learning_rate": 5e-3, "num_epochs": 2, "batch_size": 16, "microbatch_size": 16, "max_tokens": 64}
REWARD_MODEL_SETTINGS = {"learning_rate": 1e-3, "num_epochs": 1, "batch_size": 32, "max_tokens": 64}
"""What these two stages need on this task, found by experiment: many small steps, and fresh pairs instead of epochs."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the grammar's words; <pad>, <bos>, <eos> and <unk> are four different tokens.

    Text and tokens correspond one to one for lower-case text, with or without the space before a full stop.
    """
    core = Tokenizer(models.WordLevel(token_ids(vocabulary()), unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # words and punctuation apart
    joined = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before "." and "?"
    core.decoder = decoders.Sequence([joined, decoders.Replace(" :", ":")])
    return wrapped(core, max_tokens=128)


def model_config() -> LlamaConfig:
    """A causal Llama of about 0.1 million parameters, small enough for PPO on two CPU cores in minutes."""
    return small_llama(tokenizer(), hidden_size=64, num_layers=2)


def write_data(folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write the six JSON-lines files and return their paths: sft, preferences and prompts, each for training and test.

    Prompts of the test files do not occur in the training files. The same seed gives the same bytes. Writes beside
    `folder` and renames, so that it is whole or absent; it must not hold anything yet.
    """
    random, folder = Random(seed), Path(folder)
    check_empty(folder)
    prompts = _distinct_prompts(NUM_PROMPTS + NUM_TEST_PROMPTS, random)
    train, test = prompts[NUM_TEST_PROMPTS:], prompts[:NUM_TEST_PROMPTS]
    files: dict[str, list[dict[str, str]]] = {
        "sft": [_demonstration(random.choice(train), random) for _ in range(NUM_SFT)],
        "sft_test": [_demonstration(prompt, random) for prompt in test],
        "preferences_train": [_preference(random.choice(train), random) for _ in range(NUM_PREFERENCES)],
        "preferences_test": [_preference(random.choice(test), random) for _ in range(NUM_TEST_PREFERENCES)],
        "prompts_train": [{"prompt": prompt} for prompt in train],
        "prompts_test": [{"prompt": prompt} for prompt in test],
    }
    return write_files(folder, files)


def _distinct_prompts(number: int, random: Random) -> list[str]:
    prompts: dict[str, None] = {}  # a dict keeps the order of drawing, a set would not
    while len(prompts) < number:
        prompts[write_prompt(random)] = None
    return list(prompts)


def _demonstration(prompt: str, random: Random) -> dict[str, str]:
    return {"prompt": prompt, "completion": write_review(prompt, random)}


def _preference(prompt: str, random: Random) -> dict[str, str]:
    """Two reviews by random writers, ordered by the human with Bradley-Terry noise."""
    first, second = write_review(prompt, random), write_review(prompt, random)
    gap = gold_score(prompt, first) - gold_score(prompt, second)
    if random.random() > 1 / (1 + math.exp(-gap / GOLD_TEMPERATURE)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def distinct_n(completions: Iterable[str], n: int) -> float:
    """Distinct word n-grams over all completions divided by all n-grams: 1 is varied, near 0 has collapsed; 0 if none."""
    grams = [tuple(found[i : i + n]) for found in map(words, completions) for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def win_rate(prompts: Sequence[str], completions: Sequence[str], opponents: Sequence[str]) -> float:
    """Share of prompts on which the gold scorer prefers `completions` to `opponents`; a tie is half a win."""
    gaps = [
        gold_score(prompt, ours) - gold_score(prompt, theirs)
        for prompt, ours, theirs in zip(prompts, completions, opponents, strict=True)
    ]
    return sum(0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps) / len(gaps)
