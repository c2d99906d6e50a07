"""Interrupted equals uninterrupted: a run that is stopped, fails or is killed anywhere, and resumed, leaves the same bytes.

Everything that could be lost takes part: the adaptive KL coefficient, the optimizer's moments, the value head, a learning
rate that rises and falls, epochs that end within a step, evaluations. This file is also the program that gets killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import rlhf
from rlhf import Callback, InputError
from rlhf.runs.jsonlines import read_metrics
from rlhf.training import learner as learner_module
from tests import tiny
from tests.tiny import AtStep

STEPS = 4


def make_trainer(output_dir: Path, *, callbacks=(), lm=None, rewards=tiny.count_target, **changes):
    """4 steps of 4 prompts out of 5: every step but the first crosses an epoch."""
    settings = {
        "total_steps": STEPS,
        "checkpoint_every": 1,
        "warmup_steps": 2,
        "eval_dataset": tiny.rows(["abc", "hh"]),
        "eval_every": 2,
        "update": {"num_epochs": 2, "minibatch_size": 2},
        "ppo": {"kl_target": 0.5, "kl_horizon": 40, "entropy_coef": 0.01},
        "generation": {"max_new_tokens": 4},
        **changes,
    }
    lm = tiny.causal_lm(num_hidden_layers=1) if lm is None else lm
    return tiny.trainer(output_dir, lm=lm, rewards=rewards, callbacks=callbacks, **settings)


def results(output_dir: Path) -> dict[str, bytes]:
    """The bytes of everything a finished run leaves; seconds, and what names the directory or the settings, aside."""
    last = output_dir / "checkpoints" / f"step-{STEPS:06d}"
    files = [output_dir / "metrics.jsonl", output_dir / "completions.jsonl", *sorted((output_dir / "policy").iterdir())]
    files += [last / name for name in ("policy.safetensors", "optimizer.safetensors", "state.json")]
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


def differing(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What the uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole")
    make_trainer(out).train()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({line["kl_coef"] for line in lines}) == STEPS and len({line["learning_rate"] for line in lines}) == 3
    return results(out)


class Stopped(BaseException):
    """Neither an error nor Ctrl-C: nothing but the run's own clean-up sees it."""


def stop(trainer) -> None:
    trainer.should_stop = True


def break_off(trainer) -> None:
    raise Stopped


def interrupt(trainer) -> None:
    raise KeyboardInterrupt


def run_until_stopped(trainer) -> None:
    with suppress(Stopped, KeyboardInterrupt):
        trainer.train()


# --- stopped between steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [stop, break_off, interrupt], ids=lambda action: action.__name__)
@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_ends_after_any_step_and_resumes_leaves_the_same_bytes(step, action, whole, tmp_path):
    """The first half saves every step, or (when it breaks off) only what the run saves as it goes down."""
    every = 1 if action is stop else 0
    run_until_stopped(make_trainer(tmp_path, callbacks=[AtStep(step, action)], checkpoint_every=every))
    assert (tmp_path / "checkpoints" / f"step-{step + 1:06d}").is_dir()
    make_trainer(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


def test_a_run_stopped_after_every_single_step_leaves_the_same_bytes(whole, tmp_path):
    for step in range(STEPS):
        make_trainer(tmp_path, callbacks=[AtStep(step, stop)]).train(resume=step > 0)
    assert differing(results(tmp_path), whole) == []


def test_a_finished_run_resumes_to_itself(whole, tmp_path):
    make_trainer(tmp_path).train()
    make_trainer(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


def test_a_checkpoint_given_by_its_path_continues_in_another_directory(whole, tmp_path):
    """Only what comes after it is written there."""
    make_trainer(tmp_path / "a", callbacks=[AtStep(1, stop)]).train()
    make_trainer(tmp_path / "b").train(resume=str(tmp_path / "a" / "checkpoints" / "step-000002"))
    found = results(tmp_path / "b")
    assert set(differing(found, whole)) == {"metrics.jsonl", "completions.jsonl"}
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = whole[name].splitlines(keepends=True)
        assert found[name] == b"".join(line for line in lines if json.loads(line)["step"] >= 2)


# --- stopped within a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_a_reward_function_that_raises_costs_no_finished_step(checkpoint_every, whole, tmp_path):
    def ill(completions, target, trainer_state):
        if trainer_state["global_step"] == 2:
            raise RuntimeError("the judge is ill")
        return tiny.count_target(completions, target)

    ill.__name__ = "count_target"
    with pytest.raises(InputError, match="the judge is ill"):
        make_trainer(tmp_path, rewards=ill, checkpoint_every=checkpoint_every).train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume=True)
    assert differing(results(tmp_path), whole) == []


@pytest.mark.parametrize("optimizer_step", [1, 4, 6])
def test_an_update_that_is_broken_off_is_made_again_from_its_beginning(optimizer_step, whole, tmp_path):
    """Half an update belongs to no step: what is saved is the checkpoint before it."""
    trainer = make_trainer(tmp_path, checkpoint_every=2)
    done = []

    def count(*_):
        done.append(1)
        if len(done) == optimizer_step + 4:  # four optimizer steps per step; the second step or later
            raise Stopped

    trainer.learner.optimizer.register_step_post_hook(count)
    run_until_stopped(trainer)
    make_trainer(tmp_path).train(resume=True)
    assert differing(results(tmp_path), whole) == []


# --- the comparison itself ----------------------------------------------------------------------------------------------


class Forget(Callback):
    """Loses something of the resumed run before it goes on."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_start(self, trainer):
        if self.what == "kl_coef":
            trainer.learner.algorithm_state = trainer.algorithm.initial_state()
        elif self.what == "optimizer":
            trainer.learner.own_optimizer.state.clear()
        elif self.what == "value head":
            trainer.policy.critic.head.linear.weight.data.zero_()
        elif self.what == "step":
            trainer.step -= 1


@pytest.mark.parametrize("what", ["kl_coef", "optimizer", "value head"])
def test_the_comparison_notices_whatever_a_resume_could_lose(what, whole, tmp_path):
    make_trainer(tmp_path, callbacks=[AtStep(1, stop)]).train()
    make_trainer(tmp_path, callbacks=[Forget(what)]).train(resume=True)
    assert "metrics.jsonl" in differing(results(tmp_path), whole)


def test_the_comparison_notices_weights_that_were_not_restored(whole, tmp_path, monkeypatch):
    make_trainer(tmp_path, callbacks=[AtStep(1, stop)]).train()
    monkeypatch.setattr(learner_module, "load_named_tensors", lambda module, *tensors: None)
    make_trainer(tmp_path).train(resume=True)
    assert "metrics.jsonl" in differing(results(tmp_path), whole)


# --- resuming with something else ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped")
    make_trainer(out, callbacks=[AtStep(0, stop)]).train()
    return out


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dataset": tiny.rows(["ab", "c", "defgh", "gha", "bbbbbba"])}, "dataset"),
        ({"dataset": tiny.rows(tiny.PROMPTS[::-1])}, "dataset"),
        ({"dataset": [row | {"target": "h"} for row in tiny.rows()]}, "dataset_columns"),
        ({"seed": 1}, "seed"),
        ({"prompts_per_step": 2}, "prompts_per_step"),
        ({"generation": {"max_new_tokens": 5}}, r"generation\.max_new_tokens"),
        ({"generation": {"max_new_tokens": 4, "temperature": 0.9}}, r"generation\.temperature"),
        ({"lm": tiny.causal_lm(num_hidden_layers=1, seed=3)}, "reference"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_resuming_with_other_data_draws_or_policy_is_refused_and_the_difference_named(changes, field, stopped):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"{field}: .*\(saved\), .*\(now\)"):
        make_trainer(stopped, **changes).train(resume=True)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "lm", [{"num_hidden_layers": 2}, {"num_hidden_layers": 1, "intermediate_size": 32}], ids=["deeper", "wider"]
)
def test_resuming_with_a_model_of_another_shape_is_refused_without_a_reference_too(lm, tmp_path):
    make_trainer(tmp_path, ppo={"kl_coef": 0.0}, callbacks=[AtStep(0, stop)]).train()
    with pytest.raises(InputError, match=r"another model.*mlp"):
        make_trainer(tmp_path, ppo={"kl_coef": 0.0}, lm=tiny.causal_lm(**lm)).train(resume=True)


def test_another_learning_rate_is_allowed_mentioned_and_used(tmp_path, capsys):
    make_trainer(tmp_path, callbacks=[AtStep(1, stop)]).train()
    capsys.readouterr()
    make_trainer(tmp_path, learning_rate=0.004).train(resume=True)
    printed = capsys.readouterr().out
    assert "learning_rate: 0.01 (saved), 0.004 (now)" in printed and "step-000002" in printed
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01 / 2, 0.01 * 3 / 4, 0.004 / 2, 0.004 / 4])


def test_a_coefficient_without_a_target_is_the_one_that_is_set_when_the_run_is_resumed(tmp_path, capsys):
    """It is no state: the run says that it changed, and it did. One that adapts goes on from where it was."""
    fixed = {"ppo": {"kl_coef": 0.1, "penalty_coef": 0.5}}
    make_trainer(tmp_path / "fixed", callbacks=[AtStep(1, stop)], **fixed).train()
    make_trainer(tmp_path / "fixed", ppo={"kl_coef": 0.3, "penalty_coef": 0.25}).train(resume=True)
    assert "changed since: ppo.kl_coef: 0.1 (saved), 0.3 (now)" in capsys.readouterr().out
    lines = read_metrics(tmp_path / "fixed")
    assert [line["kl_coef"] for line in lines] == [0.1, 0.1, 0.3, 0.3]
    assert [line["penalty_coef"] for line in lines] == [0.5, 0.5, 0.25, 0.25]
    adaptive = {"ppo": {"kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 40}}
    make_trainer(tmp_path / "target", callbacks=[AtStep(1, stop)], **fixed).train()
    make_trainer(tmp_path / "target", **adaptive).train(resume=True)  # a target since: it starts at its setting
    begun = [line["kl_coef"] for line in read_metrics(tmp_path / "target")]
    assert begun[2] == 0.1 and begun[3] != 0.1


def test_a_run_is_not_overwritten_unasked_and_is_gone_if_asked(tmp_path, whole):
    make_trainer(tmp_path, seed=5).train()
    before = results(tmp_path)
    with pytest.raises(InputError, match=r"already holds a run.*resume.*overwrite"):
        make_trainer(tmp_path).train()
    assert results(tmp_path) == before
    make_trainer(tmp_path).train(overwrite=True)
    assert differing(results(tmp_path), whole) == []


# --- killed -------------------------------------------------------------------------------------------------------------

PACKAGE: str | tuple[str, ...] = str(Path(rlhf.__file__).parent)
SAVING = ("directory.py", "checkpoint.py", "run.py", "jsonlines.py", "export.py")


def in_child(work, *, kill_after_s: float | None = None) -> int:
    """`work()` in a forked process; how it ended (0, or minus the signal)."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def traced(work, on_call) -> None:
    """`work()`, with on_call(file name) at every call of a function of this toolkit."""

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            on_call(os.path.basename(frame.f_code.co_filename))

    sys.setprofile(profile)
    work()
    sys.setprofile(None)


def train_or_resume(output_dir: Path) -> None:
    trainer = make_trainer(output_dir, checkpoint_every=2)
    trainer.train(
        resume=(output_dir / "RUN.json").exists()
    )  # killed before it claimed the directory: nothing to resume


def main(out: Path, kills: int, timed: int = 0) -> None:
    """Kills runs with SIGKILL at `kills` places spread over all calls of this toolkit's functions, half of them in code
    that writes files, and at `timed` random times, and resumes each; prints one JSON line per kill. This process itself
    never computes anything, so that it can be forked."""
    torch.set_num_threads(1)
    calls: list[str] = []

    def count():
        traced(lambda: train_or_resume(out / "whole"), calls.append)
        (out / "calls.json").write_text(json.dumps(calls))

    assert in_child(count) == 0
    calls = json.loads((out / "calls.json").read_text())
    writing = [number for number, name in enumerate(calls) if name in SAVING]
    others = [number for number, name in enumerate(calls) if name not in SAVING]
    for kill in range(kills):
        group, rank, size = (writing, others)[kill % 2], kill // 2, (kills + 1) // 2
        place = group[int(len(group) * (rank + 0.5) / size)]
        directory, seen = out / f"killed-{kill}", []

        def die(name: str, place=place, seen=seen) -> None:
            seen.append(name)
            if len(seen) > place:
                os.kill(os.getpid(), signal.SIGKILL)

        ended = in_child(lambda directory=directory, die=die: traced(lambda: train_or_resume(directory), die))
        resumed = in_child(lambda directory=directory: train_or_resume(directory))
        print(json.dumps({"place": place, "in": calls[place], "killed": -ended, "resumed": resumed}), flush=True)
    started = time.monotonic()
    if timed:
        assert in_child(lambda: train_or_resume(out / "timed")) == 0
    seconds, draws = time.monotonic() - started, random.Random(0)
    for kill in range(kills, kills + timed):
        after, ended = seconds * draws.random(), 0
        while ended == 0:  # it was faster this time, and had ended: sooner, from the start
            directory = out / f"killed-{kill}"
            shutil.rmtree(directory, ignore_errors=True)
            ended = in_child(lambda directory=directory: train_or_resume(directory), kill_after_s=after)
            after *= 0.8
        resumed = in_child(lambda directory=directory: train_or_resume(directory))
        print(json.dumps({"seconds": after / 0.8, "killed": -ended, "resumed": resumed}), flush=True)


def killed_and_resumed(
    module: str, out: Path, kills: int, whole: dict[str, bytes], *, timed: int = 0, results=results
) -> None:
    """`python -m module out kills timed` kills the runs, as `main` does; what each leaves is compared with `whole`."""
    command = [sys.executable, "-m", module, str(out), str(kills), str(timed)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == kills + timed and {line["killed"] for line in lines} == {signal.SIGKILL}
    for kill, line in enumerate(lines):
        assert line["resumed"] == 0, (line, done.stderr[-4000:])
        assert differing(results(out / f"killed-{kill}"), whole) == [], line


def test_a_run_killed_at_four_places_and_resumed_leaves_the_same_bytes(whole, tmp_path):
    killed_and_resumed("tests.trainers.test_interruption", tmp_path, 4, whole)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_places_and_twenty_times_and_resumed_leaves_the_same_bytes(whole, tmp_path):
    killed_and_resumed("tests.trainers.test_interruption", tmp_path, 100, whole, timed=20)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
