"""The embedded task of GRPO: two-digit addition, with tokenizer, model and data generated offline by code.

    47+85=  ->  132

A simulated pupil who forgets half of the carries writes the demonstrations, so a model that imitates them is right
about half of the time. Whether an answer is right can be computed, so the model can surpass the pupil without a reward
model. `write_data(folder, seed)` writes four JSON-lines files in the format of a user's own data; they depend on the
seed alone.
"""

from math import comb
from pathlib import Path
from random import Random

from small_task import check_empty, small_llama, token_ids, wrapped, write_files
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

OPERANDS = range(10, 100)
"""Range of both numbers of a problem, which makes 8,100 problems."""
NUM_TEST = 256
FORGOTTEN_CARRIES = 0.5
"""Chance that the pupil forgets a carry; at 0.5, 55 % of the sums are right."""
NUM_SFT = 57_600
"""Demonstrations, drawn with repetition from the training problems."""

SFT_SETTINGS = {"learning_rate": 2e-3, "num_epochs": 1, "batch_size": 64, "microbatch_size": 64, "max_tokens": 16}
"""Found by experiment: 900 steps, after which the model adds nearly as well as the pupil."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; <pad>, <bos>, <eos> and <unk> are four different tokens. Text and tokens correspond one
    to one for texts of digits, "+" and "="."""
    core = Tokenizer(models.WordLevel(token_ids("0123456789+="), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return wrapped(core, max_tokens=32)


def model_config() -> LlamaConfig:
    """A causal Llama of about 0.6 million parameters, which learns to add in a minute on one CPU core."""
    return small_llama(tokenizer(), hidden_size=128, num_layers=3)


def write_data(folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write the four JSON-lines files and return their paths: sft (prompt, completion) and prompts (prompt, answer),
    each for training and test.

    No problem of the test files occurs in the training files, not even with its numbers swapped. The same seed gives
    the same bytes. `folder` must be empty or absent; it is written elsewhere and renamed, so it is never incomplete.
    """
    random = Random(seed)
    folder = Path(folder)
    check_empty(folder)
    train, test = _split(random)
    files = {
        "sft": [_demonstration(*random.choice(train), random) for _ in range(NUM_SFT)],
        "sft_test": [_demonstration(*problem, random) for problem in test],
        "prompts_train": [_question(*problem) for problem in train],
        "prompts_test": [_question(*problem) for problem in test],
    }
    return write_files(folder, files)


def _split(random: Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(training, test) problems; a + b and b + a are on the same side, since one reveals the other's answer."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a <= b]
    random.shuffle(pairs)
    test = [pair if random.random() < 0.5 else pair[::-1] for pair in pairs[:NUM_TEST]]
    train = [problem for a, b in pairs[NUM_TEST:] for problem in dict.fromkeys([(a, b), (b, a)])]
    return train, test


def _question(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def _demonstration(a: int, b: int, random: Random) -> dict[str, str]:
    """A problem with the pupil's answer."""
    return {"prompt": f"{a}+{b}=", "completion": str(add_like_a_pupil(a, b, random))}


def add_like_a_pupil(a: int, b: int, random: Random) -> int:
    """a + b, added digit by digit from the right; each carry is forgotten with probability FORGOTTEN_CARRIES."""
    total, place, carry = 0, 1, 0
    while a or b or carry:
        column = a % 10 + b % 10 + carry
        carry = int(column > 9 and random.random() >= FORGOTTEN_CARRIES)
        total += place * (column % 10)
        a, b, place = a // 10, b // 10, place * 10
    return total


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k completions is right, estimated without bias from `num_right` of `num_samples`.

    1 - C(n - c, k) / C(n, k) with n = num_samples, c = num_right: the share of the subsets of size k that hold a right
    completion (Chen et al. 2021, arXiv 2107.03374, eq. 1). 1 <= k <= num_samples, 0 <= num_right <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ValueError(
            "pass_at_k needs 1 <= k <= num_samples and 0 <= num_right <= num_samples, "
            f"but got num_samples={num_samples}, num_right={num_right}, k={k}."
        )
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)
