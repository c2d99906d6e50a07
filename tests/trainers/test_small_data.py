"""Data sets of 1 to 17 prompts on two processes: every prompt once per epoch, and sizes that cannot be split refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf import InputError
from tests import tiny
from tests.trainers import grpo_runs
from tests.trainers.ranks import two

QUICK = (1, 2, 3, 5)
REST = tuple(size for size in range(1, 18) if size not in QUICK)


def prompts(count: int) -> list[str]:
    """All different: what is counted are these texts."""
    return [chr(ord("a") + i % 8) * (1 + i // 8) for i in range(count)]


def run(rank: int, out: Path, sizes: tuple[int, ...]) -> None:
    """Train on every size; write what the rewards of this process saw: size -> kind of run -> calls of prompts."""
    seen: dict[int, dict[str, list[list[str]]]] = {}
    for size in sizes:
        rows = tiny.rows(prompts(size))
        for kind, per_step, steps in (("one step", size, 2), ("two prompts", 2, size), ("groups", size, 1)):
            calls = seen.setdefault(size, {}).setdefault(kind, [])

            def reward(prompts, completions, calls=calls, **_):
                calls.append(list(prompts))
                return [float(len(text)) for text in completions]

            settings = {"rewards": [reward], "dataset": rows, "eval_dataset": rows, "prompts_per_step": per_step}
            settings |= {"total_steps": steps, "checkpoint_every": 0, "collective_timeout_s": 60.0}
            settings |= {"generation": {"max_new_tokens": 2}, "update": {"minibatch_size": None, "num_epochs": 1}}
            if kind == "groups":
                settings["grpo"] = {"completions_per_prompt": 2, "dynamic_sampling_rounds": 1}
            make = grpo_runs.make_trainer if kind == "groups" else tiny.trainer
            try:
                make(out / f"{kind}-{size}", **settings).train()
            except InputError as error:
                calls.append([f"refused: {error}"])
    (out / f"seen.{rank}").write_text(json.dumps(seen))


def counted(seen: list[dict], size: int, kind: str) -> Counter:
    return Counter(prompt for process in seen for call in process[str(size)][kind] for prompt in call)


@pytest.mark.parametrize(
    "sizes", [pytest.param(QUICK, id="quick"), pytest.param(REST, id="rest", marks=pytest.mark.slow)]
)
def test_two_processes_take_each_prompt_once_per_epoch_and_evaluation_or_refuse_it_on_both(sizes, tmp_path):
    ranks = two(tmp_path, run, tmp_path, sizes, timeout_s=280)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    seen = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(2)]
    for size in sizes:
        if size == 1:  # one process would get no prompt
            for ((message,),) in (calls for process in seen for calls in process["1"].values()):
                assert message.startswith("refused: prompts_per_step") and "2 processes without one" in message
            continue
        two_times, evaluation = 2, 1  # two epochs of PPO; one of GRPO, with two completions
        for kind in ("one step", "two prompts", "groups"):
            assert counted(seen, size, kind) == dict.fromkeys(prompts(size), two_times + evaluation), (size, kind)
