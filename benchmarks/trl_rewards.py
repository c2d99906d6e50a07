"""Runs TRL's own reward functions, unchanged, through `Rewards` and compares the scores with ones worked out by hand.

Takes seconds: pip install -e '.[trl]'; python benchmarks/trl_rewards.py

Functions that take strings get strings; those that read `completion[0]["content"]` get conversations. Columns, token
ids, `log_extra` and None ("not applicable") are covered too. Exit status 1 if a score is not the expected one.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}

from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from rlhf.rewards.combine import RewardResult, Rewards

QUESTION = [{"role": "user", "content": "What is a third of one?"}]


def turns(*texts: str) -> list[Any]:
    """Texts as completions of conversations."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def scored(
    functions: Callable[..., Any] | Sequence[Callable[..., Any]],
    completions: Sequence[Any],
    *,
    ids: Sequence[Sequence[int]] | None = None,
    weights: Sequence[float] | None = None,
    **columns: Sequence[Any],
) -> RewardResult:
    """Call the functions as the trainer does.

    Args:
        functions: Reward functions.
        completions: Strings or conversations; the prompts are of the same kind.
        ids: Token ids of the completions; four tokens each by default.
        weights: Weights of the functions in the score.
        columns: Other columns of the data set, by name.
    """
    prompt: Any = "say" if isinstance(completions[0], str) else QUESTION
    return Rewards(functions, weights=weights)(
        prompts=[prompt] * len(completions),
        completions=completions,
        completion_ids=[[7, 8, 9, 10]] * len(completions) if ids is None else ids,
        columns=columns,
        trainer_state={"global_step": 0},
        allow_unscored=True,
    )


def main() -> None:
    checks: list[tuple[str, list[float | None], list[float | None]]] = []

    def check(name: str, result: RewardResult, expected: list[float | None]) -> None:
        checks.append((name, next(iter(result.per_function.values())), expected))

    thoughts = turns("<think>a\nb</think>\nc", "a</think> c", "<think>a", "x <think>a</think>")
    check("think_format_reward", scored(think_format_reward, thoughts), [1.0, 0.0, 0.0, 0.0])

    answers = turns(r"\boxed{\frac{1}{3}}", r"so \boxed{\frac{2}{6}}", r"\boxed{\frac{1}{2}}", r"\boxed{1}")
    solutions = [r"$\frac{1}{3}$"] * 3 + ["no formula at all"]
    accuracy = scored(accuracy_reward, answers, solution=solutions)
    check("accuracy_reward (last: gold is no formula)", accuracy, [1.0, 1.0, 0.0, None])

    lengths = [[3] * n for n in (80, 85, 90, 100, 101)]  # free up to 100 - 20, then a twentieth per token
    overlong = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    check(
        "get_soft_overlong_punishment(100, 20)",
        scored(overlong, ["x"] * 5, ids=lengths),
        [0.0, -0.25, -0.5, -1.0, -1.0],
    )

    tokens = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [6]]  # bigrams: 3 of 3 differ, 1 of 4, 2 of 4, none there
    repetition = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    check("get_repetition_penalty_reward(2, -1)", scored(repetition, ["x"] * 4, ids=tokens), [0.0, -0.75, -0.5, 0.0])

    wrong = [check for check in checks if check[1] != check[2]]
    for name, got, expected in checks:
        print(f"{name:<45}{got}{'' if got == expected else f'  EXPECTED {expected}'}")
    together = scored(
        [think_format_reward, accuracy_reward, overlong, repetition],
        turns(r"<think>a</think>\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"),
        ids=[[1, 2, 3, 4], [5] * 90],
        weights=[0.5, 1.0, 2.0, 0.0],
        solution=[r"$\frac{1}{3}$"] * 2,
    )
    print(f"{'all four, weights 0.5, 1, 2, 0':<45}{together.scores}")
    print(f"columns from log_extra: {', '.join(accuracy.extra)}; metrics: {', '.join(sorted(together.metrics))}")
    kept = not wrong and together.scores == [0.5 + 1.0, -1.0] and "gold_parsed" in accuracy.extra
    print("all as expected" if kept else "NOT as expected")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
