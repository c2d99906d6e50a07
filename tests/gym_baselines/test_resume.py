"""Interrupted equals uninterrupted, to the last bit, for every algorithm and autoreset mode; what cannot be is named."""

import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from gym_baselines import preset, train
from gym_baselines.agent import AGENT_FILE, WEIGHTS_FILE
from gym_baselines.config import with_settings
from gym_baselines.networks import ActorCritic
from rlhf.errors import InputError
from rlhf.runs.jsonlines import METRICS_FILE
from tests.gym_baselines.environments import Clock

NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}
SHORT = {  # rollouts end in the middle of episodes, and some episodes span several of them
    "ppo": {"rollout_steps": 32, "num_epochs": 2},
    "ppo_penalty": {"rollout_steps": 32, "num_epochs": 2},
    "a2c": {"rollout_steps": 20},
    "reinforce": {"rollout_steps": 30},
    "trpo": {"rollout_steps": 32, "num_epochs": 2},
}


class Stop(Exception):
    pass


def config(env, algorithm, folder, **changes):
    settings = {"num_envs": 4, "total_steps": 700, "minibatch_size": None, "progress_bar": False}
    return preset(env, algorithm, **{**settings, **SHORT[algorithm], **changes, "output_dir": folder and str(folder)})


def interrupted(config, *, after, env=None, group=None):
    """Raise in the callback of update `after`, then resume in what might be another process."""

    def stop(agent, metrics):
        stop.updates += 1
        if stop.updates == after:
            raise Stop

    stop.updates = 0
    with pytest.raises(Stop):
        train(config, env=env, callbacks=[stop], distributed=group)
    return train(with_settings(config, resume=True), env=env, distributed=group)


def written(folder):
    return {name: (Path(folder) / name).read_bytes() for name in (METRICS_FILE, WEIGHTS_FILE, AGENT_FILE)}


@pytest.mark.parametrize("env", ["CartPole-v1", "Hopper-v5"])
@pytest.mark.parametrize("algorithm", SHORT)
def test_an_interrupted_run_ends_as_if_it_had_not_been(algorithm, env, tmp_path, distributed):
    changes = NORMALIZED if env == "Hopper-v5" else {}
    train(config(env, algorithm, tmp_path / "whole", **changes), distributed=distributed)
    interrupted(config(env, algorithm, tmp_path / "parts", **changes), after=3, group=distributed)
    whole, parts = written(tmp_path / "whole"), written(tmp_path / "parts")
    assert whole[METRICS_FILE].count(b"\n") >= 5
    assert parts == whole


@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_run_is_resumed_in_every_autoreset_mode(after, autoreset, tmp_path, distributed):
    settings = {"autoreset": autoreset, "rollout_steps": 11}  # so that ends fall on the borders of rollouts, too
    train(config("CartPole-v1", "ppo", tmp_path / "whole", **settings), distributed=distributed)
    interrupted(config("CartPole-v1", "ppo", tmp_path / "parts", **settings), after=after, group=distributed)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


@pytest.mark.parametrize("after", range(1, 8))
def test_a_run_is_resumed_while_a_reset_is_pending(after, tmp_path, distributed):
    """Episodes of 3 steps and rollouts of 5: the interruption meets every phase of an episode, and its ghost."""
    settings = {"rollout_steps": 5, "total_steps": 120, "max_episode_steps": 3}
    train(config("CartPole-v1", "ppo", tmp_path / "whole", **settings), distributed=distributed)
    interrupted(config("CartPole-v1", "ppo", tmp_path / "parts", **settings), after=after, group=distributed)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


class Unrepeatable(Clock):
    """Its observations do not follow from its seed and its actions."""

    def __init__(self):
        super().__init__(limit=50)

    def step(self, action):
        _, *rest = super().step(action)
        return np.array([np.random.uniform()]), *rest


class BoundedClock(Clock):
    observation_space = gym.spaces.Box(0, 100, (1,), np.float64)

    def __init__(self):
        super().__init__(limit=50)


def test_an_environment_that_does_not_replay_is_named_and_starts_a_new_episode(tmp_path, distributed, capsys):
    settings = config("Clock", "ppo", tmp_path / "run", rollout_steps=12)
    agent = interrupted(settings, after=2, env=Unrepeatable, group=distributed)
    assert "[0, 1, 2, 3] (Clock) do not replay" in capsys.readouterr().out
    assert agent.environment_steps >= 700


def test_an_environment_that_replays_is_not_named(tmp_path, distributed, capsys):
    interrupted(
        config("Clock", "ppo", tmp_path / "run", rollout_steps=12), after=2, env=BoundedClock, group=distributed
    )
    assert "do not replay" not in capsys.readouterr().out


def test_a_run_with_other_settings_is_not_resumed(tmp_path, distributed):
    run = config("CartPole-v1", "ppo", tmp_path, total_steps=300)
    train(run, distributed=distributed)
    with pytest.raises(InputError, match=r"ppo\.gamma: 0\.98 \(saved\), 0\.5 \(now\)"):
        train(with_settings(run, gamma=0.5, resume=True), distributed=distributed)


def test_a_finished_run_can_be_prolonged(tmp_path, distributed):
    """With a constant rate, 300 steps and then up to 600 are 600 steps."""
    constant = {"lr_schedule": "constant", "anneal_clip": False}
    train(config("CartPole-v1", "ppo", tmp_path / "whole", total_steps=600, **constant), distributed=distributed)
    run = config("CartPole-v1", "ppo", tmp_path / "parts", total_steps=300, **constant)
    train(run, distributed=distributed)
    train(with_settings(run, total_steps=600, resume=True), distributed=distributed)
    assert written(tmp_path / "parts")[WEIGHTS_FILE] == written(tmp_path / "whole")[WEIGHTS_FILE]


# --- stopped at the worst moment ---


@pytest.mark.parametrize("call", [40, 70, 101])
def test_ctrl_c_in_the_middle_of_a_rollout_loses_and_changes_nothing(call, tmp_path, distributed, monkeypatch):
    train(config("CartPole-v1", "ppo", tmp_path / "whole"), distributed=distributed)
    run, sample, calls = config("CartPole-v1", "ppo", tmp_path / "parts"), ActorCritic.sample, []

    def pressed(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(ActorCritic, "sample", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(run, distributed=distributed)
    monkeypatch.setattr(ActorCritic, "sample", sample)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(with_settings(run, resume=True), distributed=distributed)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


def test_an_error_in_the_middle_of_a_rollout_does_not_spoil_the_last_checkpoint(tmp_path, distributed, monkeypatch):
    settings = {"checkpoint_every": 200}
    train(config("CartPole-v1", "ppo", tmp_path / "whole", **settings), distributed=distributed)
    run, sample, calls = config("CartPole-v1", "ppo", tmp_path / "parts", **settings), ActorCritic.sample, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 110:
            raise OSError("the simulator is gone")
        return sample(*arguments)

    monkeypatch.setattr(ActorCritic, "sample", fails)
    with pytest.raises(OSError, match="simulator"):
        train(run, distributed=distributed)
    monkeypatch.setattr(ActorCritic, "sample", sample)
    train(with_settings(run, resume=True), distributed=distributed)
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path, distributed):
    run = config("CartPole-v1", "ppo", tmp_path)
    train(run, distributed=distributed)
    before = written(tmp_path)
    train(with_settings(run, resume=True), distributed=distributed)
    assert written(tmp_path) == before


def test_an_overwritten_run_leaves_no_agent_behind(tmp_path, distributed):
    train(config("CartPole-v1", "ppo", tmp_path, total_steps=200), distributed=distributed)

    def stop(agent, metrics):
        raise Stop

    with pytest.raises(Stop):
        train(config("CartPole-v1", "ppo", tmp_path, seed=9, overwrite=True), callbacks=[stop], distributed=distributed)
    assert not (tmp_path / AGENT_FILE).exists() and not (tmp_path / WEIGHTS_FILE).exists()


def test_a_folder_with_a_saved_agent_is_not_taken_for_a_run(tmp_path, distributed):
    train(config("CartPole-v1", "ppo", None, total_steps=200), distributed=distributed).save(tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(InputError, match=r"agent\.json"):
        train(config("CartPole-v1", "ppo", tmp_path, overwrite=True), distributed=distributed)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
