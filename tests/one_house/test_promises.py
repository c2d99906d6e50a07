"""One house: language models and control tasks learn through the same `Learner` and live in the same `Run`.

What is promised of these two objects is checked in both worlds; a mutant in either object breaks a control run and a token
run alike.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import InputError, TrainingError
from rlhf.runs.jsonlines import read_metrics
from rlhf.runs.run import Run
from rlhf.training.learner import Learner
from tests.one_house.worlds import STEPS, WORLDS, At, Breaks, Control, World, breaks


@pytest.mark.parametrize("world", WORLDS)
def test_both_worlds_learn_by_the_same_learner_and_leave_the_same_run(world, tmp_path):
    trainer = world.start(tmp_path)
    assert type(trainer.learner) is Learner and type(trainer.run) is Run
    assert trainer.learner.updates == trainer.run.step == STEPS
    assert len(read_metrics(tmp_path)) == STEPS
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{STEPS:06d}"}


def resumes(world: World, folder: Path) -> None:
    """A run that an error ends after two steps, and that is resumed, leaves what an uninterrupted one leaves."""
    world.start(folder / "whole")
    with pytest.raises(Breaks):
        world.start(folder / "parts", callbacks=[At(1, breaks)])
    assert (folder / "parts" / "checkpoints" / "step-000002").is_dir()
    world.start(folder / "parts", resume=True)
    assert world.left(folder / "parts") == world.left(folder / "whole")


def follows_the_schedule(world: World, folder: Path) -> None:
    """Every optimizer step is made at the learning rate that is logged, which falls."""
    used: list[float] = []
    watch = At(-1, breaks)
    watch.on_train_start = lambda trainer: trainer.learner.own_optimizer.register_step_pre_hook(  # type: ignore[method-assign]
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    if isinstance(world, Control):  # its optimizer steps on vectors: it reads the rate where the hook reads it
        watch.on_step_end = lambda trainer, *_: used.append(trainer.learner.own_optimizer.param_groups[0]["lr"])  # type: ignore[method-assign]
    world.start(folder, callbacks=[watch])
    logged = [line["learning_rate"] for line in read_metrics(folder)]
    assert sorted(set(used), reverse=True) == logged == sorted(set(logged), reverse=True)


def adapts(world: World, folder: Path) -> None:
    """The coefficient that the algorithm adapts moves from step to step."""
    world.start(folder)
    coefficients = [line.get("kl_coef", line.get("penalty_coef")) for line in read_metrics(folder)]
    assert len(set(coefficients)) > 1


def learns(world: World, folder: Path) -> None:
    """The weights move, and the run's last update is in what it leaves."""
    made: list[torch.Tensor] = []

    def note(trainer: Any) -> None:
        made.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))

    trainer = world.start(folder, callbacks=[At(0, note), At(1, note)])
    note(trainer)
    assert not made[0].equal(made[1]) and not made[1].equal(made[2])


PROMISES = [resumes, follows_the_schedule, adapts, learns]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("world", WORLDS)
def test_it_is_kept(world, promise, tmp_path):
    promise(world, tmp_path)


def forgets_to_commit(patch: pytest.MonkeyPatch) -> None:
    """What the algorithm adapted is thrown away."""
    learn = Learner.learn

    def forgetful(self, *args, **kwargs):
        before = dict(self.algorithm_state)
        metrics = learn(self, *args, **kwargs)
        self.algorithm_state = before
        return metrics

    patch.setattr(Learner, "learn", forgetful)


def ignores_the_learning_rate(patch: pytest.MonkeyPatch) -> None:
    learn = Learner.learn
    patch.setattr(
        Learner, "learn", lambda self, t, **kw: {**learn(self, t, **{**kw, "learning_rate": 1e-2}), **rate(kw)}
    )


def rate(arguments: dict[str, Any]) -> dict[str, float]:
    return {"learning_rate": arguments["learning_rate"]}


def learns_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("rlhf.training.learner.update", lambda *args, **kwargs: {"optimizer_steps": 0.0})


def loads_no_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("rlhf.training.learner.load_optimizer_tensors", lambda *args, **kwargs: None)


def loads_no_state(patch: pytest.MonkeyPatch) -> None:
    load = Learner.load

    def forgetful(self, saved):
        load(self, saved)
        self.algorithm_state = self.algorithm.initial_state()

    patch.setattr(Learner, "load", forgetful)


def saves_nothing_after_an_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_rescue", lambda self: None)


def begins_anew(patch: pytest.MonkeyPatch) -> None:
    """The run opens its directory at the right checkpoint, and counts from 0."""
    opened = Run.open

    def forgetful(self, **options):
        opened(self, **options)
        self.step = self.saved_step = 0

    patch.setattr(Run, "open", forgetful)


def logs_a_step_late(patch: pytest.MonkeyPatch) -> None:
    logged = Run.log

    def late(self, metrics, samples=()):
        self.step += 1
        logged(self, metrics, samples)
        self.step -= 1

    patch.setattr(Run, "log", late)


MUTANTS = [
    (forgets_to_commit, adapts),
    (ignores_the_learning_rate, follows_the_schedule),
    (learns_nothing, learns),
    (loads_no_optimizer, resumes),
    (loads_no_state, resumes),
    (saves_nothing_after_an_error, resumes),
    (begins_anew, resumes),
    (logs_a_step_late, resumes),
]


@pytest.mark.parametrize(("mutant", "promise"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
@pytest.mark.parametrize("world", WORLDS)
def test_a_mutant_of_either_object_breaks_a_run_of_each_world(world, mutant, promise, tmp_path, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, InputError, TrainingError)):  # some are noticed by the run itself
        promise(world, tmp_path)
