"""GRPO runs that are stopped, broken off or killed leave the bytes of the run that nothing stopped.

This file is also the program that gets killed; how it is killed is in tests/trainers/test_interruption.py.
"""

import json
import sys
from pathlib import Path

import pytest

from rlhf import Callback, InputError
from rlhf.runs.checkpoint import Saved
from rlhf.runs.jsonlines import read_metrics
from tests.tiny import AtStep
from tests.trainers import test_interruption as interruption
from tests.trainers.grpo_runs import PROMPTS, Recorded, make_trainer, make_whole, shape, verdict
from tests.trainers.test_interruption import STEPS, Stopped, break_off, differing, results, run_until_stopped, stop

# --- interrupted ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What the uninterrupted run leaves; its steps sample in different numbers of rounds."""
    out = tmp_path_factory.mktemp("whole")
    make_whole(out).train()
    assert len({line["dynamic_sampling/rounds"] for line in read_metrics(out)}) > 1
    return results(out)


@pytest.mark.parametrize("action", [stop, break_off], ids=lambda action: action.__name__)
@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_ends_after_any_step_and_resumes_leaves_the_same_bytes(step, action, whole, tmp_path):
    every = 1 if action is stop else 0
    run_until_stopped(make_whole(tmp_path, callbacks=[AtStep(step, action)], checkpoint_every=every))
    assert (tmp_path / "checkpoints" / f"step-{step + 1:06d}").is_dir()
    make_whole(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


@pytest.mark.parametrize(("optimizer_step", "when"), [(1, "post"), (2, "pre"), (2, "post"), (3, "pre"), (4, "post")])
def test_a_rollout_broken_off_between_two_of_its_updates_is_made_again(optimizer_step, when, whole, tmp_path):
    """Four optimizer steps learn from each rollout; the third rollout's are broken off, one finished step unsaved."""
    trainer, done = make_whole(tmp_path, checkpoint_every=2), []

    def count(*_):
        done.append(1)
        if len(done) == 2 * 4 + optimizer_step:
            raise Stopped

    getattr(trainer.learner.optimizer, f"register_step_{when}_hook")(count)
    run_until_stopped(trainer)
    assert len(done) == 2 * 4 + optimizer_step and len(read_metrics(tmp_path)) == 2
    make_whole(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


@pytest.mark.parametrize("round_", [1, 2])
def test_a_reward_function_that_raises_in_any_round_costs_no_finished_step(round_, whole, tmp_path):
    """Also in a later round of dynamic sampling: the data cursor goes back to the step's first prompt."""
    lines = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    step = max(line["step"] for line in lines if line["dynamic_sampling/rounds"] >= round_)
    assert step > 0
    calls: list[int] = []

    def ill(completions, target, trainer_state):
        calls.append(trainer_state.global_step)
        if calls.count(step) == round_:
            raise RuntimeError("the judge is ill")
        return verdict(completions, target)

    ill.__name__ = "verdict"
    with pytest.raises(InputError, match="the judge is ill"):
        make_whole(tmp_path, rewards=(ill, shape), checkpoint_every=0).train()
    assert len(read_metrics(tmp_path)) == step
    make_whole(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


class Forget(Callback):
    """Loses the data cursor of the resumed run: it counts prompts as if every step had taken one round."""

    def on_train_start(self, trainer):
        trainer.source.load(Saved({"prompts_seen": trainer.step * trainer.config.prompts_per_step}))


def test_the_comparison_notices_a_lost_data_cursor(whole, tmp_path):
    seen = [json.loads(line)["prompts_seen"] for line in whole["metrics.jsonl"].splitlines()]
    assert seen[1] != 6
    make_whole(tmp_path, callbacks=[AtStep(1, stop)]).train()
    make_whole(tmp_path, callbacks=[Forget()]).train(resume=True)
    assert "metrics.jsonl" in differing(results(tmp_path), whole)


def test_prompts_go_on_where_the_interrupted_run_was_and_none_comes_twice_in_an_epoch(tmp_path):
    calls = Recorded()
    make_trainer(tmp_path / "whole", rewards=(calls,)).train()
    drawn = [prompt for prompt, _, _ in calls.rows][::4]
    seen = [line["prompts_seen"] for line in read_metrics(tmp_path / "whole")]
    assert len(drawn) == seen[-1] > 3 * STEPS  # more than one round somewhere
    for start in range(0, len(drawn) - len(PROMPTS) + 1, len(PROMPTS)):
        assert sorted(drawn[start : start + len(PROMPTS)]) == sorted(PROMPTS)
    halves = [Recorded(), Recorded()]
    make_trainer(tmp_path / "halves", rewards=(halves[0],), callbacks=[AtStep(1, stop)]).train()
    make_trainer(tmp_path / "halves", rewards=(halves[1],)).train(resume=True)
    assert len(halves[0].rows) == 4 * seen[1]
    assert halves[0].rows + halves[1].rows == calls.rows


def main(out: Path, kills: int, timed: int) -> None:
    """Kills GRPO runs as tests/trainers/test_interruption.py kills PPO's."""
    interruption.make_trainer = make_whole
    interruption.main(out, kills, timed)


def test_a_run_killed_at_four_places_and_resumed_leaves_the_same_bytes(whole, tmp_path):
    interruption.killed_and_resumed("tests.trainers.test_grpo_resume", tmp_path, 4, whole)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_places_and_twenty_times_and_resumed_leaves_the_same_bytes(whole, tmp_path):
    interruption.killed_and_resumed("tests.trainers.test_grpo_resume", tmp_path, 100, whole, timed=20)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
