"""One process that fails, is killed or hangs ends all, in time and by name, wherever it is; and the run resumes."""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest

from rlhf import InputError, TrainingError, distributed
from rlhf.commands.cli import guard
from rlhf.core.random import EVALUATION
from rlhf.layout import Replicated
from rlhf.rewards.combine import Rewards
from rlhf.rollout.in_process import InProcessEngine
from rlhf.rollout.scoring import Scorer
from rlhf.training.learner import Learner
from tests import tiny
from tests.trainers.ranks import two

STEP = 2
"""The step in which a process fails; steps 0 and 1 are saved."""
TIMEOUT_S = 5.0
"""The runs' collective_timeout_s."""
IN_TIME_S = 10.0
"""From the failure, or from the end of the waiting for a process that hangs, to the end of both processes."""
PHASES = ("sampling", "rewards", "scoring", "update", "evaluation", "checkpoint")
HOW = ("raises", "is killed", "hangs")
CASES = {f"{how} in {phase}": number for number, (how, phase) in enumerate(itertools.product(HOW, PHASES))}
QUICK = ("raises in rewards", "is killed in update", "hangs in sampling", "hangs in checkpoint")


def rank_of(case: str) -> int:
    """The process that fails: each in every phase and in every way. Rank 0 carries the hub and writes the files."""
    how, phase = divmod(CASES[case], len(PHASES))
    return (how + phase) % 2


def make_trainer(out: Path, **settings):
    settings = {"total_steps": 4, "checkpoint_every": 1, "eval_every": 1, "collective_timeout_s": TIMEOUT_S, **settings}
    return tiny.trainer(out, **{"eval_dataset": tiny.rows(["abc", "hh"]), **settings})


def trains(rank: int, out: Path, resume: bool) -> None:
    os.chdir(out)
    make_trainer(Path("run")).train(resume=resume)


def fails(rank: int, out: Path, case: str) -> None:
    """Train; process `rank_of(case)` does what the case says."""
    os.chdir(out)
    trainer = make_trainer(Path("run"))
    if rank == rank_of(case):
        how, _, phase = case.partition(" in ")

        def strike() -> None:
            Path("struck").write_text(str(time.time()))
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hangs":
                time.sleep(3600)
            raise RuntimeError("lightning has struck")

        arm(trainer, phase, strike)
    trainer.train()


def arm(trainer, phase: str, strike) -> None:
    """Let `strike` be called in the `phase` of step `STEP`, in the place of what is computed there."""
    owner, name, is_there = {
        "sampling": (InProcessEngine, "submit", lambda self, requests, *_: requests[0].key.stream != EVALUATION),
        "evaluation": (InProcessEngine, "submit", lambda self, requests, *_: requests[0].key.stream == EVALUATION),
        "scoring": (Scorer, "_forward", lambda *_: True),
        "update": (Replicated, "backward", lambda *_: True),
        "rewards": (Rewards, "_call_all", lambda *_: True),
        "checkpoint": (Learner, "state", lambda self, step: step == STEP + 1),
    }[phase]
    before = getattr(owner, name)

    def struck(*arguments, **keywords):
        if trainer.step >= STEP and is_there(*arguments):
            strike()
        return before(*arguments, **keywords)

    setattr(owner, name, struck)


def left_in(out: Path) -> dict[str, bytes]:
    """The files of a run, but for the seconds."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "times.jsonl"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    ranks = two(out, trains, out, False)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    return left_in(out / "run")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_a_process_that_fails_ends_all_in_time_by_name_and_the_run_resumes(case, whole, tmp_path):
    ranks = two(tmp_path, fails, tmp_path, case)
    seconds = max(rank.at for rank in ranks) - float((tmp_path / "struck").read_text())
    how, _, phase = case.partition(" in ")
    guilty = rank_of(case)
    print(f"{case} (rank {guilty}): {seconds:.1f} s")
    assert all(rank.code for rank in ranks), ranks  # None if it did not end, 0 if it ended as if all were well
    assert seconds < IN_TIME_S + (TIMEOUT_S if how == "hangs" else 0.0)
    other = ranks[1 - guilty].printed
    where = f"in step {STEP}, phase {phase.replace('evaluation', 'evaluation/sampling')}"
    assert re.search(rf"Rank {guilty} of 2 [\w ]+ {where}[.,:]", other)
    assert "gloo" not in other and other.count("\n") < 40
    said = {"raises": "RuntimeError: lightning has struck", "is killed": "was killed", "hangs": "collective_timeout_s"}
    assert said[how] in other and "--resume" in other

    again = two(tmp_path, trains, tmp_path, True)
    assert [rank.code for rank in again] == [0, 0], again
    assert left_in(tmp_path / "run") == whole


# ---- where a process cannot notice by itself, and where nothing has failed ----


def busy(rank: int, out: Path) -> None:
    """Process 1 fails in its reward; process 0 is in its own, which never returns."""
    os.chdir(out)

    def reward(completions, trainer_state, **_):
        if trainer_state.global_step == STEP:
            if rank == 0:
                time.sleep(3600)
            Path("struck").write_text(str(time.time()))
            raise RuntimeError("lightning has struck")
        return [0.0] * len(completions)

    make_trainer(Path("run"), rewards=reward, collective_timeout_s=600.0).train()


def survived_by_a_child(rank: int, out: Path) -> None:
    """Process 1 is killed, and a child that it forked keeps its connections to process 0 open."""
    os.chdir(out)

    def reward(completions, trainer_state, **_):
        if trainer_state.global_step == STEP and rank == 1:
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            Path("struck").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return [0.0] * len(completions)

    make_trainer(Path("run"), rewards=reward, collective_timeout_s=600.0).train()


@pytest.mark.parametrize(("job", "reason"), [(busy, "failed"), (survived_by_a_child, "was killed or crashed")])
def test_a_process_that_cannot_notice_that_another_has_failed_is_ended_by_its_thread(job, reason, tmp_path):
    first, second = two(tmp_path, job, tmp_path, timeout_s=30)
    assert first.code == 1 and second.code
    assert max(first.at, second.at) - float((tmp_path / "struck").read_text()) < IN_TIME_S
    assert f"Rank 1 of 2 {reason} in step {STEP}, phase rewards" in first.printed
    assert f"This process ends too: rank 0 of 2 is in step {STEP}, phase " in first.printed
    if job is busy:  # where: the line that sleeps
        assert f"{Path(__file__).name}:{busy.__code__.co_firstlineno + 7}." in first.printed


def sleeps(rank: int, out: Path) -> None:
    """Process 1 is stopped for longer than the others' patience with one that fails."""
    os.chdir(out)

    def stops(trainer) -> None:
        if rank == 1:
            Path("stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        while not Path("stopped").exists():
            time.sleep(0.1)
        if rank == 0:
            time.sleep(5)
            os.kill(int(Path("stopped").read_text()), signal.SIGCONT)

    make_trainer(Path("run"), callbacks=[tiny.AtStep(STEP, stops)], collective_timeout_s=60.0).train()


def both_fail(rank: int, out: Path) -> None:
    """Both fail alike; the program catches it and goes on."""
    os.chdir(out)
    for attempt in range(2):
        trainer = make_trainer(Path("run"))
        if attempt == 0:
            arm(trainer, "rewards", strike_all)
        try:
            trainer.train(resume=bool(attempt))
        except ValueError:
            time.sleep(rank)
            Rewards._call_all = CALL_ALL


def strike_all() -> None:
    raise ValueError("lightning everywhere")


CALL_ALL = Rewards._call_all


@pytest.mark.slow
@pytest.mark.parametrize("job", [sleeps, both_fail])
def test_a_process_that_is_merely_slow_and_an_error_that_all_catch_end_nothing(job, whole, tmp_path):
    ranks = two(tmp_path, job, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    kept = left_in(tmp_path / "run")
    if job is sleeps:  # the timeout is in the checkpoints
        kept, whole = ({n: b for n, b in files.items() if "MANIFEST" not in n} for files in (kept, whole))
    assert kept == whole


# ---- bad input of one process only ----


def bad_input(rank: int, out: Path, name: str) -> None:
    """Train with the input `name` on process 1, and with good ones on process 0."""
    os.chdir(out)
    changes = dict(BAD_INPUT[name]) if rank == 1 else {}
    resume = changes.pop("resume", False)
    if callable(reward := changes.get("rewards")):
        reward.__name__ = "count_target"  # as on process 0: processes with different rewards are refused at the start
    with guard():
        try:
            trainer = make_trainer(Path("run"), reward_timeout_s=3.0, **changes)
            trainer.train(resume=resume)
        except BaseException as error:
            if not isinstance(error, TrainingError) or "cannot go on alone" not in str(error):
                Path("struck").write_text(str(time.time()))
            raise


def leaves(**_):
    raise SystemExit(3)


def waits(**_):
    time.sleep(60)


BAD_INPUT = {
    "a prompt that is a number": {"dataset": [{"prompt": 3}]},
    "a data set that is not there": {"dataset": "/no/such/file.jsonl"},
    "no held-out prompt": {"eval_dataset": []},
    "a model that is not there": {"lm": "/no/such/model"},
    "a tokenizer that is not there": {"tokenizer": "/no/such/tokenizer"},
    "a reward that is none": {"rewards": [7]},
    "a reward without its column": {"rewards": lambda completions, answer: [0.0] * len(completions)},
    "a batch that is not a multiple": {"update": {"minibatch_size": 3}},
    "a checkpoint that is not there": {"resume": "/no/such/run"},
    "a score that is text": {"rewards": lambda completions, **_: ["good"] * len(completions)},
    "a score that is NaN": {"rewards": lambda completions, **_: [float("nan")] * len(completions)},
    "a score too few": {"rewards": lambda completions, **_: [0.0] * (len(completions) - 1)},
    "no score at all": {"rewards": lambda completions, **_: [None] * len(completions)},
    "a reward that exits": {"rewards": leaves},
    "a reward that does not return": {"rewards": waits},
    "a model of another size": {"lm": tiny.causal_lm(hidden_size=24)},
}
QUICK_INPUT = ("a prompt that is a number", "a score that is NaN")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_INPUT else [pytest.mark.slow]) for n in BAD_INPUT]
)
def test_bad_input_of_one_process_ends_all_at_once_and_says_whose_it_was(name, tmp_path):
    ranks = two(tmp_path, bad_input, tmp_path, name, timeout_s=40)
    assert all(rank.code for rank in ranks), ranks
    assert max(rank.at for rank in ranks) - float((tmp_path / "struck").read_text()) < IN_TIME_S
    assert "rlhf: this was rank 1 of 2, in step 0, phase " in ranks[1].printed
    assert "Rank 1 of 2 failed in step 0, phase " in ranks[0].printed and "Traceback" not in ranks[0].printed


DIFFERENT = {"seed": 1, "total_steps": 5, "dataset": tiny.rows(["ab", "c"]), "lm": tiny.causal_lm(seed=3)}


def different(rank: int, out: Path, name: str) -> None:
    with guard():
        make_trainer(out / "run", **({name: DIFFERENT[name]} if rank == 1 else {})).train()


@pytest.mark.parametrize("name", ["seed", *(pytest.param(n, marks=pytest.mark.slow) for n in DIFFERENT if n != "seed")])
def test_processes_with_different_settings_data_or_models_are_refused_by_name(name, tmp_path):
    """They would compute different things, and wait for one another in different places."""
    ranks = two(tmp_path, different, tmp_path, name)
    named = {"lm": "reference"}.get(name, name)
    for rank in ranks:
        assert rank.code == 2 and re.search(rf"error: {named}=.* on process 0, but .* on process 1", rank.printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_positive_number_is_refused(seconds, tmp_path):
    with pytest.raises(InputError, match=r"collective_timeout_s=.*above 0"):
        make_trainer(tmp_path, collective_timeout_s=seconds)


def test_a_timeout_that_comes_too_late_for_the_group_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "_timeout_s", 60.0)
    assert distributed._note_on_timeout(True, 60.0) == []
    (note,) = distributed._note_on_timeout(True, 5.0)
    assert "collective_timeout_s=5 has no effect" in note
