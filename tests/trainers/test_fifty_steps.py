"""Fifty steps in float32: DDP and FSDP2 on two processes have the losses of one, also resumed from another layout.

The processes are real ones (gloo). The learning rate is small: Adam divides a gradient by its own size, so that rounding
differences of gradients near 0 become differences of whole updates.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.layout import FullySharded
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.trainers import grpo_runs
from tests.trainers.grpo_runs import lines_of
from tests.trainers.ranks import two

pytestmark = pytest.mark.slow
STEPS, HALF = 50, 30
LOSS, GRADIENT = 1e-5, 1e-6
LAYOUTS = {"ddp": "DDP", "fsdp2": "FSDP2"}
ALGORITHMS = ["ppo", "grpo"]
EVERYWHERE = ["one", *LAYOUTS]


def make_trainer(algorithm: str, out: Path) -> Any:
    settings = {"total_steps": STEPS, "learning_rate": 1e-4, "checkpoint_every": HALF, "keep_checkpoints": 2}
    if algorithm == "ppo":
        rows, update = tiny.rows(grpo_runs.PROMPTS), {"minibatch_size": 3, "num_epochs": 1}
        return tiny.trainer(out, dataset=rows, prompts_per_step=6, update=update, log_completions=6, **settings)
    return grpo_runs.make_trainer(
        out, lm=tiny.causal_lm(), prompts_per_step=4, update={"minibatch_size": 8}, **settings
    )


def run(algorithm: str, out: Path) -> None:
    """The whole run, and its first gradient."""
    trainer, first = make_trainer(algorithm, out), {}

    def keep(*_: Any) -> None:
        if not first:
            gradients = {n: p.grad for n, p in trainer.policy.named_parameters() if p.grad is not None}
            first["gradient"] = {n: g.clone() for n, g in trainer.distributed.layout.whole(gradients).items()}

    trainer.learner.own_optimizer.register_step_pre_hook(keep)
    trainer.train()
    if trainer.distributed.is_main:
        torch.save(first["gradient"], out / "gradient.pt")


def go_on(out: Path, source: str, target: str) -> None:
    """From the checkpoint that `source` wrote, in a directory of its own."""
    trainer = make_trainer("ppo", out / f"{source}-{target}")
    trainer.train(resume=str(out / source / "ppo" / "checkpoints" / f"step-{HALF:06d}"))


def job(rank: int, out: Path) -> None:
    """What each of two processes does."""
    FullySharded.whole_up_to = 0  # every tensor of a checkpoint in shards
    for layout, name in LAYOUTS.items():
        os.environ.update({"ACCELERATE_USE_FSDP": str(layout == "fsdp2").lower(), "FSDP_VERSION": "2"})
        for algorithm in ALGORITHMS:
            run(algorithm, out / layout / algorithm)
            assert make_trainer(algorithm, out / "unused").distributed.layout.name == name
    for layout in LAYOUTS:
        os.environ.update({"ACCELERATE_USE_FSDP": str(layout == "fsdp2").lower(), "FSDP_VERSION": "2"})
        for source in EVERYWHERE:
            go_on(out, source, layout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fifty")
    for algorithm in ALGORITHMS:
        run(algorithm, out / "one" / algorithm)
    ranks = two(out / "printed", job, out, timeout_s=1500)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for source in EVERYWHERE:
        go_on(out, source, "one")
    return out


def furthest(expected: list[dict], got: list[dict]) -> float:
    """The largest difference of a loss; steps and names agree."""
    names = [name for name in expected[0] if name.endswith("_loss") or name == "loss"]
    assert names and [line["step"] for line in expected] == [line["step"] for line in got]
    return max(abs(a[name] - b[name]) for a, b in zip(expected, got, strict=True) for name in names)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fifty_steps_in_float32_have_the_losses_and_the_first_gradient_of_one_process(algorithm, layout, runs):
    one, several = runs / "one" / algorithm, runs / layout / algorithm
    expected, got = read_metrics(one), read_metrics(several)
    assert len(expected) == STEPS
    print(f"{algorithm}, {layout}: losses differ by up to {furthest(expected, got):.1e}")
    assert furthest(expected, got) <= LOSS
    gradients, others = torch.load(one / "gradient.pt"), torch.load(several / "gradient.pt")
    assert gradients.keys() == others.keys()
    gap = max((gradients[name] - others[name]).abs().max().item() for name in gradients)
    print(f"{algorithm}, {layout}: first gradients differ by up to {gap:.1e}")
    assert gap <= GRADIENT and max(g.abs().max().item() for g in gradients.values()) > 1e-2
    tokens = [{(line["step"], line["prompt"], line["completion"]) for line in lines_of(run)} for run in (one, several)]
    assert {step for step, *_ in tokens[1]} == set(range(STEPS)) and tokens[1] <= tokens[0]


@pytest.mark.parametrize("target", EVERYWHERE)
@pytest.mark.parametrize("source", EVERYWHERE)
def test_twenty_steps_from_the_checkpoint_of_any_layout_have_the_losses_of_the_whole_run(source, target, runs):
    expected = read_metrics(runs / "one" / "ppo")[HALF:]
    got = read_metrics(runs / f"{source}-{target}")
    assert len(got) == STEPS - HALF
    print(f"{source} to {target}: losses differ by up to {furthest(expected, got):.1e}")
    assert furthest(expected, got) <= LOSS


def test_the_comparison_notices_another_learning_rate(runs, tmp_path):
    """Negative control: a thousandth more, in one process."""
    trainer = make_trainer("ppo", tmp_path)
    trainer.config = trainer.config.__class__(**{**vars(trainer.config), "learning_rate": 1.001e-4})
    trainer.train()
    assert furthest(read_metrics(runs / "one" / "ppo"), read_metrics(tmp_path)) > LOSS
