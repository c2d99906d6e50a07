"""Whole training runs: they learn, repeat themselves to the byte, do not depend on the processes, refuse bad input."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gym_baselines import Agent, TrainConfig, evaluate, preset, train
from gym_baselines.__main__ import main, parse_config
from gym_baselines.agent import WEIGHTS_FILE
from gym_baselines.config import with_settings
from rlhf.algorithms.ppo import PPOConfig
from rlhf.commands.cli import from_plain
from rlhf.core.advantages import gae
from rlhf.errors import InputError
from rlhf.runs.jsonlines import METRICS_FILE, read_metrics
from rlhf.runs.metrics import unknown_names
from rlhf.training.update import UpdateConfig
from tests.broken import gae_takes_truncation_for_termination
from tests.controls import refute
from tests.gym_baselines import group_worker
from tests.gym_baselines.environments import Clock, Identity


def short(**changes):
    return preset("CartPole-v1", total_steps=1000, progress_bar=False, **changes)


# --- learning ---


def quick(env, **changes):
    """General settings cut down to a few seconds."""
    return TrainConfig(
        env=env,
        total_steps=2_500,
        rollout_steps=32,
        learning_rate=1e-2,
        update=UpdateConfig(num_epochs=5, minibatch_size=64, max_grad_norm=5.0),
        progress_bar=False,
        **changes,
    )


def test_ppo_learns_to_name_the_symbol_it_is_shown(distributed):
    """The optimum is 10 of 10; always naming the same symbol gets 10/3."""
    agent = train(quick("Identity"), env=Identity, distributed=distributed)
    assert evaluate(agent.policy, Identity, episodes=20).returns.tolist() == [10.0] * 20
    assert evaluate(agent.policy, Identity, episodes=100, greedy=False).mean > 9


def test_the_value_function_of_an_endless_task_does_not_notice_its_time_limit(distributed, monkeypatch):
    """Reward 1 per step, gamma 0.9, episodes cut after 20 steps: V = 10 in every state, also in the last before the cut.
    Were the limit taken for an end, V would fall to 1 there."""
    ppo = PPOConfig(kl_coef=0.0, gamma=0.9, value_coef=1.0, value_clip_range=None, normalize_advantages="minibatch")

    def check(estimator):
        monkeypatch.setattr("rlhf.algorithms.ppo.gae", estimator)
        agent = train(quick("Clock", ppo=ppo), env=_clock_of_twenty, distributed=distributed)
        with torch.no_grad():
            values = agent.policy.values(torch.linspace(0, 1, 21)[:, None])
        assert (values - 10).abs().max() < 0.6

    check(gae)
    refute(check, gae_takes_truncation_for_termination)


def _clock_of_twenty():
    return gym.wrappers.RescaleObservation(_FiniteClock(limit=20), 0, 1)


class _FiniteClock(Clock):
    observation_space = gym.spaces.Box(0, 20, (1,), np.float64)


def test_cartpole_is_balanced_within_40_000_steps(distributed):
    """rl-zoo's preset first passes 475 after 10 000 to 28 000 steps; the run stops there."""
    updates = []

    def stop_when_balanced(agent, metrics):
        updates.append(metrics)
        if len(updates) % 10 == 0:
            return evaluate(agent.policy, "CartPole-v1", episodes=20).mean < 475
        return len(updates) < 160  # of 256 transitions

    agent = train(
        preset("CartPole-v1", seed=1, progress_bar=False), callbacks=[stop_when_balanced], distributed=distributed
    )
    assert evaluate(agent.policy, "CartPole-v1", episodes=20).mean >= 475
    assert agent.environment_steps < 40_000


@pytest.mark.slow
@pytest.mark.parametrize("value_clip_range", [None, 0.2])
def test_cartpole_is_balanced_for_500_steps_after_100_000(value_clip_range, distributed):
    """rl-zoo's preset: at least 9 of 10 seeds end at 500 over 100 greedy episodes; with the value clip on, 3 of 3."""
    seeds, needed = (range(10), 9) if value_clip_range is None else (range(3), 3)
    solved = []
    for seed in seeds:
        config = preset("CartPole-v1", seed=seed, progress_bar=False, value_clip_range=value_clip_range)
        agent = train(config, distributed=distributed)
        solved.append(evaluate(agent.policy, "CartPole-v1", episodes=100, seed=seed).returns.min() == 500)
    assert sum(solved) >= needed, solved


# --- the same run, however often and wherever ---


def test_the_same_seed_gives_the_same_metrics_file_and_weights_and_another_seed_does_not(tmp_path, distributed):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        train(short(seed=seed, output_dir=str(tmp_path / name)), distributed=distributed)
        torch.rand(3)  # somebody else's use of the global generator

    def same(file, one, two):
        return (tmp_path / one / file).read_bytes() == (tmp_path / two / file).read_bytes()

    for file in (METRICS_FILE, WEIGHTS_FILE):
        assert same(file, "first", "second") and not same(file, "first", "other")
    metrics = read_metrics(tmp_path / "first")
    assert unknown_names(key for key in metrics[0] if key != "step") == []
    assert not any("second" in key or "time" in key for key in metrics[0])


@pytest.fixture(scope="module")
def alone_and_in_a_group(tmp_path_factory, distributed):
    """All cases of group_worker, by this process and by two others."""
    tmp_path, world_size = tmp_path_factory.mktemp("processes"), 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gym_baselines.group_worker", str(tmp_path / "group")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    group_worker.run(tmp_path / "alone", distributed)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]

    return tmp_path / "alone", tmp_path / "group"


@pytest.mark.parametrize("case", group_worker.CASES)
def test_two_processes_train_the_same_policy_as_one(case, alone_and_in_a_group):
    folders = [folder / case for folder in alone_and_in_a_group]
    alone, group = (load_file(folder / WEIGHTS_FILE) for folder in folders)
    for name, tensor in alone.items():
        assert tensor.dtype in (torch.float64, torch.int64)  # the normaliser counts
        torch.testing.assert_close(group[name], tensor, rtol=0, atol=1e-9)
    alone_metrics, group_metrics = (read_metrics(folder) for folder in folders)
    assert len(alone_metrics) == len(group_metrics) >= 5
    for one, other in zip(alone_metrics, group_metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-7, abs=1e-9)


# --- agents ---


def test_a_saved_agent_acts_like_the_trained_one(tmp_path, distributed):
    agent = train(short(output_dir=str(tmp_path)), distributed=distributed)
    loaded = Agent.load(tmp_path)
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for deterministic in (True, False):
        expected = agent.predict(observations, deterministic=deterministic)
        assert (loaded.predict(observations, deterministic=deterministic) == expected).all()
    assert loaded.predict(observations[0]) == agent.predict(observations)[0]
    assert loaded.environment_steps == agent.environment_steps >= 1000
    assert with_settings(from_plain(TrainConfig, loaded.settings), progress_bar=False) == short()


def test_an_evaluation_is_a_function_of_its_seed_and_counts_every_episode_once(distributed):
    policy = train(short(), distributed=distributed).policy
    for greedy in (True, False):
        whole = evaluate(policy, "CartPole-v1", episodes=12, seed=3, greedy=greedy)
        part = evaluate(policy, "CartPole-v1", episodes=5, seed=3, greedy=greedy)
        assert whole.returns[:5].tolist() == part.returns.tolist()
        assert (whole.returns == whole.lengths).all()  # CartPole pays 1 per step
    assert whole.returns.tolist() != evaluate(policy, "CartPole-v1", episodes=12, seed=4, greedy=False).returns.tolist()


def test_a_callback_sees_every_update_and_can_stop_the_training(distributed):
    seen = []

    def stop_after_two(agent, metrics):
        seen.append(metrics["environment_steps"])
        return len(seen) < 2

    agent = train(short(), callbacks=[stop_after_two], distributed=distributed)
    assert len(seen) == 2 and agent.environment_steps == seen[-1] < 1000


def test_the_learning_rate_and_the_clip_fall_linearly_to_zero(tmp_path, distributed):
    train(short(output_dir=str(tmp_path)), distributed=distributed)
    metrics = read_metrics(tmp_path)
    done = [0, *(line["environment_steps"] for line in metrics)]
    expected = [1e-3 * (1 - steps / 1000) for steps in done[:-1]]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(expected)


# --- bad input ---


class TextActions(Clock):
    action_space = gym.spaces.Text(3)


class DictObservations(Clock):
    observation_space = gym.spaces.Dict({"time": gym.spaces.Discrete(3)})


BAD_SETTINGS = {
    "an unknown environment": ({"env": "CartPol-v1"}, ["CartPol-v1", "CartPole-v1"]),
    "an unknown version": ({"env": "CartPole-v9"}, ["CartPole-v9"]),
    "no steps": ({"total_steps": 0}, ["total_steps", "0"]),
    "no environments": ({"num_envs": 0}, ["num_envs", "0"]),
    "an empty rollout": ({"rollout_steps": 0}, ["rollout_steps", "0"]),
    "an unknown autoreset mode": ({"autoreset": "eventually"}, ["autoreset", "eventually", "next_step"]),
    "a minibatch that does not divide": ({"num_envs": 7}, ["minibatch_size", "256", "224"]),
    "a minibatch larger than the rollout": ({"rollout_steps": 8}, ["minibatch_size", "256", "64"]),
    "a learning rate of zero": ({"learning_rate": 0.0}, ["learning_rate", "0.0"]),
    "a learning rate that is no number": ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
    "a negative seed": ({"seed": -1}, ["seed", "-1"]),
    "an empty layer": ({"hidden_sizes": (64, 0)}, ["hidden_sizes", "0"]),
    "a penalty without a reference": ({"ppo": PPOConfig()}, ["kl_coef", "0.05"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS, ids=str)
def test_a_bad_setting_is_named_with_its_value_before_anything_runs(case, tmp_path, distributed):
    changes, named = BAD_SETTINGS[case]
    with pytest.raises(InputError) as error:
        train(with_settings(short(output_dir=str(tmp_path / "run")), **changes), distributed=distributed)
    assert all(part in str(error.value) for part in named), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env, named", [(TextActions, "Text("), (DictObservations, "Dict('time'")])
def test_a_space_that_is_not_supported_is_refused_by_name(env, named, distributed):
    with pytest.raises(InputError, match=named.split("(")[0]) as error:
        train(short(), env=env, distributed=distributed)
    assert named in str(error.value)


def test_a_run_is_replaced_only_if_asked_for(tmp_path, distributed):
    train(short(output_dir=str(tmp_path)), distributed=distributed)
    before = (tmp_path / METRICS_FILE).read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        train(short(output_dir=str(tmp_path), seed=1), distributed=distributed)
    assert (tmp_path / METRICS_FILE).read_bytes() == before
    train(short(output_dir=str(tmp_path), seed=1, overwrite=True), distributed=distributed)
    assert len(read_metrics(tmp_path)) == before.count(b"\n")


@pytest.mark.parametrize("damage", ["missing", "weights cut short", "another file format", "weights of another size"])
def test_a_damaged_or_foreign_agent_is_refused(damage, tmp_path, distributed):
    if damage != "missing":
        train(short(output_dir=str(tmp_path)), distributed=distributed)
    if damage == "weights cut short":
        (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:-8])
    elif damage == "another file format":
        (tmp_path / "agent.json").write_text('{"model_type": "llama"}')
    elif damage == "weights of another size":
        text = (tmp_path / "agent.json").read_text()
        (tmp_path / "agent.json").write_text(text.replace('"n": 2', '"n": 3'))
    with pytest.raises(InputError, match="does not hold an agent"):
        Agent.load(tmp_path)


# --- the commands ---


def test_the_train_command_writes_an_agent_that_the_evaluate_command_plays(tmp_path, capsys):
    folder = str(tmp_path / "run")
    main(
        [
            "train",
            "--total_steps=600",
            "--seed=3",
            f"--output_dir={folder}",
            "--progress_bar=false",
            "--ppo.clip_range=0.3",
        ]
    )
    printed = capsys.readouterr().out
    assert "tuned settings" in printed and "greedy actions: return" in printed and "sampled actions: return" in printed
    settings = Agent.load(folder).settings
    assert settings["ppo"]["clip_range"] == 0.3 and settings["ppo"]["gamma"] == 0.98 and settings["seed"] == 3
    main(["evaluate", folder, "--episodes", "100", "--seed", "3"])
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[2:4]  # the same episodes as after training


def test_settings_come_from_the_preset_then_the_file_then_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("env: CartPole-v1\nnum_envs: 16\nppo: {gamma: 0.9, gae_lambda: 0.5}\n")
    config = parse_config(["--config", str(tmp_path / "run.yaml"), "--ppo.gamma", "0.8", "--seed", "5"])
    assert (config.num_envs, config.ppo.gamma, config.ppo.gae_lambda, config.seed) == (16, 0.8, 0.5, 5)
    assert (config.update.num_epochs, config.learning_rate) == (20, 1e-3)  # of the preset
    assert config.output_dir == "runs/CartPole-v1-ppo-seed5"


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "usage"),
        (["tarin"], "usage"),
        (["train", "--env", "CartPol-v1"], "CartPole-v1"),
        (["train", "--stpes", "3"], "--stpes"),
        (["train", "--learning_rate", "fast"], "learning_rate"),
        (["train", "--update.minibatch_size", "100"], "minibatch_size"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["evaluate", "absent"], "absent"),
    ],
)
def test_a_bad_command_ends_in_a_message_without_a_traceback(arguments, named, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and named in printed and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []
