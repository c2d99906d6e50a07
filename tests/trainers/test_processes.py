"""Two processes equal one: the same tokens, statistics and parameters, and neither waits for ever for the other.

The processes are real ones (torchrun, gloo); this file is also what they run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import Callback
from rlhf.runs.jsonlines import read_metrics
from tests import tiny

STEPS = 3
PROMPTS = ["ab", "c", "defgh", "gha", "bbbbbbb", "hg", "fed"]

# Shares of the prompts, of a minibatch's rows and of its microbatches are uneven, or empty on one of the processes.
CASES = {
    "uneven": {
        "lm": "gpt2",
        "prompts_per_step": 9,  # 4 and 5 prompts; minibatches of 3: 2 rows and 1
        "update": {"minibatch_size": 3, "microbatch_tokens": 24},
        "ppo": {"kl_target": 0.5, "kl_horizon": 50, "entropy_coef": 0.02},
        "eval_every": 2,
    },
    "none": {
        "lm": "llama",
        "prompts_per_step": 5,
        "update": {"minibatch_size": 1},  # the second process has no row of any minibatch
        "ppo": {"kl_target": 2.0, "normalize_advantages": "none"},
        "missing_eos": "replace",
        "missing_eos_value": -1.0,
        "generation": {"temperature": 0.6},
    },
    "stopped": {
        "lm": "llama",
        "prompts_per_step": 7,
        "update": {"minibatch_size": 7, "num_epochs": 4, "target_kl": 0.02, "microbatch_tokens": 1},
        "ppo": {"normalize_advantages": "minibatch"},
    },
}


def make_trainer(case: str, output_dir: Path, *, calls: list, callbacks=(), lm=None):
    settings = dict(CASES[case])
    family = settings.pop("lm")

    def reward(completions, target, completion_ids, prompts, log_metric):
        calls.append([list(prompts), [list(ids) for ids in completion_ids]])
        for text in completions:
            log_metric("letters", len(text))
        if "hg" in prompts:  # on one process only
            log_metric("has_hg", 1)
        return tiny.count_target(completions, target)

    return tiny.trainer(
        output_dir,
        lm=tiny.causal_lm(family, dtype=torch.float64),
        rewards=reward,
        dataset=tiny.rows(PROMPTS),
        eval_dataset=tiny.rows(["abc", "hh", "dead"]),
        total_steps=STEPS,
        callbacks=callbacks,
        **settings,
    )


def run_case(case: str, output_dir: Path) -> dict:
    """Parameters after all steps, and what the reward function saw: the tokens of every step and evaluation."""
    calls: list = []
    trainer = make_trainer(case, output_dir, calls=calls)
    trainer.train()
    return {"weights": dict(trainer.policy.state_dict()), "calls": calls}


class StopAfterFirst(Callback):
    def on_step_end(self, trainer, step, metrics):
        trainer.should_stop = True


def main(out: Path, what: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    if what == "equal":
        for case in CASES:
            torch.save(run_case(case, out / case), out / f"{case}.{rank}.pt")
        make_trainer("uneven", out / "continued", calls=[], callbacks=[StopAfterFirst()]).train()
    else:
        trainer = make_trainer("uneven", out / "failing", calls=[])
        if rank == "1":
            trainer.rewards._calls[0].function = fail
        trainer.train()


def fail(**_):
    raise RuntimeError("the judge is ill")


def launch(out: Path, what: str, timeout: float = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "tests.trainers.test_processes",
        str(out),
        what,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The directory in which two processes have run every case."""
    out = tmp_path_factory.mktemp("two")
    done = launch(out, "equal")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, two):
    """(name, what one process computed, what two processes computed)."""
    out = tmp_path_factory.mktemp("one")
    one = {**run_case(request.param, out), "metrics": read_metrics(out)}
    ranks = [torch.load(two / f"{request.param}.{rank}.pt") for rank in range(2)]
    return request.param, one, {"ranks": ranks, "metrics": read_metrics(two / request.param)}


def test_two_processes_sample_the_tokens_that_one_samples(case):
    _, one, both = case
    first, second = (rank["calls"] for rank in both["ranks"])
    joined = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
    assert joined == one["calls"]
    assert len({len(ids) for _, completions in joined for ids in completions}) > 2  # of unequal length


def test_two_processes_learn_the_parameters_that_one_learns(case):
    name, one, both = case
    first, second = (rank["weights"] for rank in both["ranks"])
    start = tiny.causal_lm(CASES[name]["lm"], dtype=torch.float64).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert max((first[key] - one["weights"][key]).abs().max().item() for key in first) == pytest.approx(0, abs=1e-9)
    assert max((first[f"lm.{key}"] - start[key]).abs().max().item() for key in start) > 1e-3  # it did learn


def test_two_processes_report_the_metrics_that_one_reports(case):
    name, one, both = case
    assert len(both["metrics"]) == STEPS
    for line, expected in zip(both["metrics"], one["metrics"], strict=True):
        assert line == pytest.approx(expected, abs=1e-8)
        assert "custom/letters" in line
    assert any("custom/has_hg" in line for line in one["metrics"])
    assert "eval/reward_kl" in one["metrics"][-1]
    if name == "stopped":  # the stop fired, on both at the same optimizer step
        assert min(line["optimizer_steps"] for line in one["metrics"]) < 4


def test_a_checkpoint_of_two_processes_continues_on_one(two, tmp_path):
    whole = run_case("uneven", tmp_path)
    trainer = make_trainer("uneven", two / "continued", calls=[])
    trainer.train(resume=True)
    weights = trainer.policy.state_dict()
    assert max((weights[key] - whole["weights"][key]).abs().max().item() for key in weights) == pytest.approx(
        0, abs=1e-9
    )
    for line, expected in zip(read_metrics(two / "continued"), read_metrics(tmp_path), strict=True):
        assert line == pytest.approx(expected, abs=1e-8)


@pytest.mark.slow
def test_when_one_process_fails_all_end_and_the_reason_is_printed(tmp_path):
    done = launch(tmp_path, "failing", timeout=120)
    assert done.returncode != 0 and "the judge is ill" in done.stderr
    assert "Rank 1 of 2 failed in step 0, phase rewards: InputError: " in done.stderr  # says the other
    assert re.search(r"rank +: 1 ", done.stderr.partition("Root Cause")[2])  # says the launcher


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
