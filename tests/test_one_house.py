"""One house: language models and control tasks learn through the same `Learner` and live in the same `Run`.

What is promised of these two objects is checked in both worlds, by short runs of the real trainers; a mutant in either
object breaks a control run and a token run alike.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gym_baselines import PPO, preset
from gym_baselines.agent import WEIGHTS_FILE
from gym_baselines.collect import Collector
from gym_baselines.config import with_settings
from gym_baselines.envs.environments import EnvironmentConfig, make_vector_env
from gym_baselines.layers import Normalizer
from gym_baselines.networks import ActorCritic
from gym_baselines.report import EnvironmentBar
from gym_baselines.train import Training
from rlhf import Callback, InputError, Trainer, TrainingError
from rlhf.rollout.prompts import PromptSource, Sampler
from rlhf.runs.checkpoint import Saved
from rlhf.runs.jsonlines import MetricsWriter, read_metrics
from rlhf.runs.reporting import StepBar
from rlhf.runs.run import Run
from rlhf.runs.signals import Interrupted
from rlhf.training.learner import Learner
from tests import tiny

STEPS = 4
ROOT = Path(__file__).parents[1]


class World:
    """A short run of 4 steps in one of the two worlds, which can be stopped and resumed."""

    weights_file: str

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = ()) -> Any:
        """Train to the end; the trainer."""
        raise NotImplementedError

    def left(self, folder: Path) -> dict[str, bytes]:
        """What a finished run leaves."""
        return {name: (folder / name).read_bytes() for name in ("metrics.jsonl", self.weights_file)}


class Tokens(World):
    weights_file = "policy/model.safetensors"

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = ()) -> Any:
        settings = {"total_steps": STEPS, "ppo": {"kl_target": 0.5, "kl_horizon": 40}, "callbacks": callbacks}
        trainer = tiny.trainer(folder, lm=tiny.causal_lm(num_hidden_layers=1), **settings)
        trainer.train(resume=resume)
        return trainer


class Control(World):
    weights_file = WEIGHTS_FILE

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = (), eval_every: int | None = None) -> Any:
        config = preset(
            "CartPole-v1",
            "ppo_penalty",
            num_envs=4,
            rollout_steps=16,
            total_steps=STEPS * 64 - 40,  # ghost steps do not count
            num_epochs=2,
            minibatch_size=None,
            lr_schedule="linear",
            checkpoint_every=None,
            eval_every=eval_every,
            progress_bar=False,
            output_dir=str(folder),
        )
        training = Training(with_settings(config, resume=resume))
        try:
            training.train(callbacks)
        finally:
            training.close()
        return training


WORLDS = [pytest.param(Tokens(), id="tokens"), pytest.param(Control(), id="control")]


@pytest.mark.parametrize("world", WORLDS)
def test_both_worlds_learn_by_the_same_learner_and_leave_the_same_run(world, tmp_path):
    trainer = world.start(tmp_path)
    assert type(trainer.learner) is Learner and type(trainer.run) is Run
    assert trainer.learner.updates == trainer.run.step == STEPS
    assert len(read_metrics(tmp_path)) == STEPS
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{STEPS:06d}"}


# --- what is promised of the two objects ---


class Breaks(Exception):
    pass


class At(Callback):
    """Does something when a step has ended."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, trainer, step, metrics):
        if step == self.step:
            self.action(trainer)


def breaks(trainer: Any) -> None:
    raise Breaks


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


@pytest.mark.parametrize("world", WORLDS)
def test_a_sampler_that_is_no_longer_the_policy_ends_the_run_at_that_step_and_no_earlier_one_is_lost(
    world, tmp_path, monkeypatch
):
    learn = Learner.learn

    def astray(self, trajectories, *, step, **kwargs):
        off = 0.05 if step >= 2 else 0.0
        moved = replace(trajectories, sampling_logprobs=trajectories.sampling_logprobs + off)
        return learn(self, moved, step=step, **kwargs)

    monkeypatch.setattr(Learner, "learn", astray)
    with pytest.raises(TrainingError, match=r"up to 0\.05 nats in step 2 .*not the same policy"):
        world.start(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()


# --- nothing trained is lost ---


def fails_at(step: int, error: BaseException):
    """A method in whose place the `step`-th call fails, and the others do what it did."""

    def wrap(method):
        calls = []

        def failing(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == step:
                raise error
            return method(self, *args, **kwargs)

        return failing

    return wrap


@pytest.mark.parametrize("place", ["evaluation", "log file", "progress bar", "the engine or environment"])
@pytest.mark.parametrize("world", WORLDS)
def test_an_error_outside_the_update_loses_no_step(world, place, tmp_path, monkeypatch):
    """The third step fails: two are saved if its rollout did, three if what followed its update did."""
    token = isinstance(world, Tokens)
    source = PromptSource if token else Collector
    where = {
        "evaluation": (Run, "notify"),
        "log file": (MetricsWriter, "write"),
        "progress bar": (StepBar if token else EnvironmentBar, "show"),
        "the engine or environment": (source, "collect"),
    }
    owner, method = where[place]
    call = 4 if place == "evaluation" else 3  # on_train_start is the first
    monkeypatch.setattr(owner, method, fails_at(call, Breaks())(getattr(owner, method)))
    with pytest.raises(Breaks):
        world.start(tmp_path)
    steps = 2 if place == "the engine or environment" else 3
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}").is_dir()
    monkeypatch.undo()
    assert world.start(tmp_path, resume=True).run.step >= STEPS


def test_an_evaluation_that_fails_leaves_its_step_logged_and_saved(tmp_path, monkeypatch):
    for name, owner in (("tokens", Trainer), ("control", Training)):
        monkeypatch.setattr(owner, "evaluate", fails_at(2, Breaks())(owner.evaluate))
        with pytest.raises(Breaks):
            if name == "tokens":
                settings = {"total_steps": STEPS, "eval_dataset": tiny.rows(["abc"]), "eval_every": 1}
                tiny.trainer(tmp_path / name, **settings).train()
            else:
                Control().start(tmp_path / name, eval_every=64)
        steps = len(read_metrics(tmp_path / name))
        assert 2 <= steps <= 3 and (tmp_path / name / "checkpoints" / f"step-{steps:06d}").is_dir()


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_whose_rollout_failed_in_its_middle_goes_on_from_the_step_before_to_the_same_bytes(
    world, tmp_path, monkeypatch
):
    """The environments are put back to where they were when that rollout began."""
    world.start(tmp_path / "whole")
    owner, method, call = (Sampler, "__call__", 3) if isinstance(world, Tokens) else (ActorCritic, "sample", 40)
    monkeypatch.setattr(owner, method, fails_at(call, Breaks())(getattr(owner, method)))
    with pytest.raises(Breaks):
        world.start(tmp_path / "parts")
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoints" / "step-000002").is_dir()
    world.start(tmp_path / "parts", resume=True)
    assert world.left(tmp_path / "parts") == world.left(tmp_path / "whole")


def test_a_normaliser_that_was_interrupted_is_never_saved_as_that_of_a_step(tmp_path, monkeypatch):
    """The weights of a step belong with the statistics after it: without them, the checkpoint before it stays."""

    def run(folder, resume=False):
        options = {"resume": resume, "checkpoint_every": 64, "normalize_observations": True}
        config = preset("Pendulum-v1", "ppo", num_envs=4, rollout_steps=16, total_steps=4 * 64, num_epochs=1)
        config = with_settings(config, minibatch_size=None, progress_bar=False, output_dir=str(folder), **options)
        training = Training(config)
        try:
            training.train()
        finally:
            training.close()

    run(tmp_path / "whole")
    monkeypatch.setattr(Normalizer, "update", fails_at(3, KeyboardInterrupt())(Normalizer.update))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "checkpoints" / "step-000003").exists()
    run(tmp_path / "parts", resume=True)
    for name in ("metrics.jsonl", WEIGHTS_FILE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_environments_whose_workers_have_died_cost_no_step(tmp_path, monkeypatch):
    learn = Learner.learn

    def then_they_die(self, *arguments, **options):
        metrics = learn(self, *arguments, **options)
        if options["step"] == 2:
            for process in training.envs.processes:
                process.kill()
                process.join()
        return metrics

    monkeypatch.setattr(Learner, "learn", then_they_die)
    config = preset("CartPole-v1", "ppo", num_envs=2, rollout_steps=16, total_steps=400, minibatch_size=None)
    options = {"vectorization": "async", "checkpoint_every": None, "progress_bar": False}
    training = Training(with_settings(config, output_dir=str(tmp_path), **options))
    with pytest.raises(Exception):  # noqa: B017  whatever a broken pipe raises in Gymnasium
        training.train()
    assert (tmp_path / "checkpoints" / "step-000003").is_dir()


@pytest.mark.parametrize("world", WORLDS)
def test_after_an_error_that_followed_an_update_the_same_trainer_goes_on(world, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsWriter, "write", fails_at(2, Breaks())(MetricsWriter.write))
    made = []
    with pytest.raises(Breaks):
        world.start(tmp_path, callbacks=[At(0, made.append)])
    monkeypatch.undo()
    (trainer,) = made
    assert trainer.run.step == trainer.learner.updates == 2


@pytest.mark.parametrize("world", WORLDS)
def test_a_callback_that_makes_a_step_of_its_own_ends_the_run_with_every_step_saved(world, tmp_path):
    with pytest.raises(InputError, match=r"learn\(step=1\).*train\(\) alone calls train_step"):
        world.start(tmp_path, callbacks=[At(0, lambda trainer: (trainer.train_step(), trainer.train_step()))])
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()


DEAF = {
    "tokens": "from tests import tiny; tiny.trainer({out!r}, total_steps=40).train()",
    "control": "from gym_baselines.__main__ import main\n"
    "main(['train', '--env', 'CartPole-v1', '--total_steps', '5000', '--output_dir', {out!r}])",
}


@pytest.mark.parametrize("name", DEAF)
def test_a_run_whose_output_nobody_reads_any_more_goes_on(name, tmp_path):
    """As with `... 2>&1 | tee log` after Ctrl-C: the pipe's reader ends first."""
    reader, writer = os.pipe()
    run = subprocess.Popen(
        [sys.executable, "-c", DEAF[name].format(out=str(tmp_path))], cwd=ROOT, stdout=writer, stderr=writer
    )
    os.close(writer)
    while b"\n" not in (tmp_path / "metrics.jsonl").read_bytes() if (tmp_path / "metrics.jsonl").exists() else True:
        assert run.poll() is None
        time.sleep(0.05)
    os.close(reader)
    run.wait(timeout=120)
    assert len(read_metrics(tmp_path)) >= (40 if name == "tokens" else 20)
    assert (tmp_path / ("policy" if name == "tokens" else WEIGHTS_FILE)).exists()


def test_workers_of_environments_leave_ctrl_c_to_the_trainer():
    envs = make_vector_env("CartPole-v1", rows=range(2), seed=0, options=EnvironmentConfig(vectorization="async"))
    envs.reset()
    for process in envs.processes:
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    observations, *_ = envs.step(envs.action_space.sample())
    envs.close()
    assert len(observations) == 2


# --- what a run refuses costs nothing ---


def test_a_checkpoint_of_another_model_deletes_nothing_even_with_overwrite(tmp_path):
    options = {"total_steps": 1, "ppo": {"kl_coef": 0.0}}
    tiny.trainer(tmp_path / "one", **options).train()
    tiny.trainer(tmp_path / "two", lm=tiny.causal_lm(num_hidden_layers=1), **options).train()
    before = sorted(path for path in (tmp_path / "one").rglob("*"))
    trainer = tiny.trainer(tmp_path / "one", **options)
    with pytest.raises(InputError):
        trainer.train(resume=str(tmp_path / "two"), overwrite=True)
    assert sorted(path for path in (tmp_path / "one").rglob("*")) == before
    trainer.train(resume=True)  # and it is unlocked


def test_resume_takes_paths_and_refuses_what_is_none(tmp_path):
    tiny.trainer(tmp_path, total_steps=1).train()
    longer = tiny.trainer(tmp_path, total_steps=2)
    with pytest.raises(InputError, match=r"resume=1: give True, False, or the path"):
        longer.train(resume=1)
    longer.train(resume=tmp_path / "checkpoints" / "step-000001")
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_source_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Bare:
        def __init__(self, prompts):
            self.collect = prompts.collect

    class Odd(Bare):
        def state(self, step):
            return Saved({1: "an integer key"})

        def load(self, saved): ...

    for kind, message in ((Bare, "needs the methods state"), (Odd, "JSON cannot hold")):
        with pytest.raises(InputError, match=message):
            tiny.trainer(tmp_path, source=kind).train()
        assert not (tmp_path / "metrics.jsonl").exists()


def test_a_source_with_a_metric_that_nobody_knows_is_refused_before_it_is_learnt_from(tmp_path):
    class Chatty:
        def __init__(self, prompts):
            self.prompts, self.state, self.load = prompts, prompts.state, prompts.load

        def collect(self, step):
            collected = self.prompts.collect(step)
            return replace(collected, metrics={**collected.metrics, "custom/mine": 1.0, "staleness": 2.0})

    trainer = tiny.trainer(tmp_path, source=Chatty)
    with pytest.raises(InputError, match=r"metrics staleness are not in the table.*custom/NAME"):
        trainer.train()
    assert not trainer.learner.has_learnt


def test_a_directory_is_free_again_when_its_run_is_gone(tmp_path):
    agent = PPO("CartPole-v1", n_envs=2, n_steps=16, batch_size=32, output_dir=str(tmp_path))
    agent.learn(32, progress_bar=False)
    del agent
    gc.collect()
    again = PPO("CartPole-v1", n_envs=2, n_steps=16, batch_size=32, output_dir=str(tmp_path), resume=True)
    again.learn(64, progress_bar=False)


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("world", WORLDS)
def test_a_signal_in_the_middle_of_a_step_ends_the_run_after_it_saved_and_free(world, number, tmp_path, monkeypatch):
    world.start(tmp_path / "whole")
    learn, steps = Learner.learn, []

    def pressed(self, *args, **kwargs):
        steps.append(kwargs["step"])
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return learn(self, *args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as raised:
        patch.setattr(Learner, "learn", pressed)
        world.start(tmp_path / "parts")
    assert raised.value.number == number and steps == [0, 1] and signal.getsignal(number) is before
    assert not (tmp_path / "parts" / world.weights_file).exists()  # nothing pretends to be the result
    world.start(tmp_path / "parts", resume=True)
    assert world.left(tmp_path / "parts") == world.left(tmp_path / "whole")


@pytest.mark.parametrize("world", WORLDS)
def test_a_second_signal_ends_the_run_at_once_and_one_that_a_launcher_repeats_does_not(world, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.runs.signals.SAME_SIGNAL_S", 0.2)
    learn, reached = Learner.learn, []

    def pressed(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the same, by way of a launcher
        reached.append("after the first")
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "learn", pressed)
    with pytest.raises(Interrupted):
        world.start(tmp_path)
    assert reached == ["after the first"]


COMMANDS = {
    "tokens": "from tests import tiny; from rlhf.commands.cli import guard\n"
    "with guard(): tiny.trainer({out!r}, total_steps=100000).train()",
    "control": "from gym_baselines.__main__ import main\n"
    "main(['train', '--env', 'CartPole-v1', '--total_steps', '100000000', '--output_dir', {out!r}])",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_a_signal_ends_says_what_is_saved_and_exits_as_shells_expect(name, number, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-u", "-c", COMMANDS[name].format(out=str(out))]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as process:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors[-2000:]
    assert "the run ends after this step" in errors and "Traceback" not in errors
    assert "continue with resume" in printed and list((out / "checkpoints").glob("step-*"))
