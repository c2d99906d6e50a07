"""One process that fails, is killed or hangs ends all, in time and by name, wherever it is; and the run resumes."""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest

from rlhf.core.random import EVALUATION
from rlhf.distributed import Distributed
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
    return tiny.trainer(out, eval_dataset=tiny.rows(["abc", "hh"]), **settings)


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
        "update": (Distributed, "backward", lambda *_: True),
        "rewards": (type(trainer.rewards), "_call_all", lambda *_: True),
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
