"""Whatever error ends a run, the steps that it has completed are saved, and it goes on from them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from gym_baselines import preset
from gym_baselines.agent import WEIGHTS_FILE
from gym_baselines.collect import Collector
from gym_baselines.config import with_settings
from gym_baselines.envs.environments import EnvironmentConfig, make_vector_env
from gym_baselines.layers import Normalizer
from gym_baselines.networks import ActorCritic
from gym_baselines.report import EnvironmentBar
from gym_baselines.train import Training
from rlhf import InputError, Trainer, TrainingError
from rlhf.rollout.prompts import PromptSource, Sampler
from rlhf.runs.jsonlines import MetricsWriter, read_metrics
from rlhf.runs.reporting import StepBar
from rlhf.runs.run import Run
from rlhf.training.learner import Learner
from tests import tiny
from tests.one_house.worlds import ROOT, STEPS, WORLDS, At, Breaks, Control, Tokens, fails_at


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
