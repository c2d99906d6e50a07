"""REINFORCE's rollouts are whole episodes: every step is learnt from once, whatever the resets and the batch."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gym_baselines import Reinforce
from gym_baselines.collect import Collector
from rlhf.algorithms.ppo import PPO as Algorithm
from rlhf.algorithms.ppo import PPOConfig
from rlhf.core.masking import local_sum
from rlhf.training import learner as learner_module
from tests.controls import refute
from tests.gym_baselines.environments import Oracle

# --- REINFORCE: whole episodes, each step once ---


class Ledger(gym.Env):
    """Every step ever made pays another reward, and the environment writes down which episodes it has finished.

    Lengths differ between environments and from episode to episode; every other episode ends by its time limit. The
    observation is V of the state where values are `exact`: then the reward is what makes every advantage 0.
    """

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)
    action_space = Discrete(2)
    made: list["Ledger"]
    GAMMA = 0.9

    def __init__(self, exact: bool = False) -> None:
        self.number, self.exact = len(Ledger.made), exact
        self.steps, self.episode, self.now = 0, -1, []
        self.finished: list[list[float]] = []
        Ledger.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.now = self.episode + 1, []
        return self._state(), {}

    def step(self, action):
        before = self._state()
        self.steps += 1
        reward = 1000.0 * self.number + self.steps
        self.now.append(reward)
        after = self._state()
        ends = len(self.now) == 2 + (3 * self.episode + self.number) % 6
        terminated = ends and self.episode % 2 == 0
        if self.exact:
            reward = float(before[0] - self.GAMMA * after[0] * (not terminated))
        if ends:
            self.finished.append(self.now)
        return after, reward, terminated, ends and not terminated, {}

    def _state(self) -> np.ndarray:
        return np.array([1.0 + self.episode + len(self.now) ** 2])


@pytest.fixture
def ledgers() -> list[Ledger]:
    Ledger.made = []
    return Ledger.made


def returns_to_go(rewards: list[float], gamma: float) -> dict[float, float]:
    """reward of a step -> discounted sum from it to the end of its episode."""
    found, total = {}, 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
        found[reward] = total
    return found


MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def check_whole_episodes(
    ledgers: list[Ledger], mode: AutoresetMode, num_steps: int, spoil=lambda learnt: learnt
) -> None:
    """Rollouts of `num_steps` cut episodes of 2 to 7 steps anywhere; `spoil` may break what was learnt from."""
    ledgers.clear()
    envs = SyncVectorEnv([Ledger] * 3, autoreset_mode=mode)
    collector = Collector(envs, Oracle(lambda t: 0 * t), seed=0, whole_episodes=True, with_values=False)
    algorithm = Algorithm(
        PPOConfig(
            surrogate="score",
            baseline="none",
            gae_lambda=1.0,
            gamma=0.9,
            kl_coef=0.0,
            normalize_advantages="none",
        )
    )
    learnt, played = [], 0
    for _ in range(12):
        rollout = collector.collect(num_steps)
        played += rollout.num_steps
        batch = algorithm.prepare(rollout.trajectories, 0.0, {}, local_sum)
        mask = rollout.trajectories.mask
        assert mask.any()
        learnt += zip(rollout.trajectories.rewards[mask].tolist(), batch.advantages[mask].tolist(), strict=True)
    learnt = spoil(learnt)
    real = [ledger for ledger in ledgers if ledger.steps]
    episodes = [episode for ledger in real for episode in ledger.finished]
    assert len(episodes) > 8
    wanted = {key: value for episode in episodes for key, value in returns_to_go(episode, 0.9).items()}
    assert len(learnt) == len(wanted) and {reward for reward, _ in learnt} == wanted.keys()
    assert all(advantage == pytest.approx(wanted[reward], abs=1e-9) for reward, advantage in learnt)
    assert played == sum(ledger.steps for ledger in real)
    assert float(rollout.finished[..., 1].sum()) == mask.sum()


@pytest.mark.parametrize("num_steps", [1, 4, 9])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_step_of_a_finished_episode_is_learnt_from_once_with_its_whole_return(ledgers, mode, num_steps):
    check_whole_episodes(ledgers, mode, num_steps)


def test_the_check_of_whole_episodes_notices_what_is_missing_or_twice_or_unfinished(ledgers):
    for spoil in (
        lambda learnt: learnt[1:],
        lambda learnt: [*learnt, learnt[-1]],
        lambda learnt: [*learnt, (999.0, 999.0)],
        lambda learnt: [(reward, reward) for reward, _ in learnt],
    ):
        refute(lambda spoil: check_whole_episodes(ledgers, MODES[0], 4, spoil), spoil)


def test_cut_rollouts_would_not_pass_the_check_of_whole_episodes(ledgers, monkeypatch):
    real = Collector.__init__

    def cut(self, *args, whole_episodes, **kw):
        real(self, *args, whole_episodes=False, **kw)

    monkeypatch.setattr(Collector, "__init__", cut)
    refute(lambda mode: check_whole_episodes(ledgers, mode, 4), MODES[1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_with_a_baseline_whole_episodes_bootstrap_from_the_value_of_what_followed_their_limit(ledgers, mode):
    """V is exact, and rewards are V - gamma V': no step is better than expected, the ones at time limits least of all."""
    envs = SyncVectorEnv([partial(Ledger, exact=True)] * 3, autoreset_mode=mode)
    collector = Collector(envs, Oracle(lambda value: value), seed=0, whole_episodes=True)
    algorithm = Algorithm(PPOConfig(gae_lambda=1.0, gamma=0.9, kl_coef=0.0, normalize_advantages="none"))
    limits = 0
    for _ in range(8):
        trajectories = collector.collect(4).trajectories
        advantages = algorithm.prepare(trajectories, 0.0, {}, local_sum).advantages
        assert advantages.abs().max().item() == pytest.approx(0, abs=1e-10)
        limits += int((trajectories.episode_ends & ~trajectories.terminated & trajectories.mask).sum())
    assert limits > 5


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_reinforce_without_a_baseline_trains_on_exactly_that(ledgers, monkeypatch, double, autoreset):
    batches, real = [], learner_module.update

    def recorded(policy, algorithm, batch, *args, **kw):
        batches.append(batch)
        return real(policy, algorithm, batch, *args, **kw)

    monkeypatch.setattr(learner_module, "update", recorded)
    learner = Reinforce(
        Ledger,
        baseline="none",
        normalize_advantages="none",
        gamma=0.9,
        n_envs=3,
        n_steps=5,
        learning_rate=1e-6,
        autoreset=autoreset,
        progress_bar=False,
    ).learn(100)
    real_ones = [ledger for ledger in ledgers if ledger.steps]
    wanted = [
        value for ledger in real_ones for episode in ledger.finished for value in returns_to_go(episode, 0.9).values()
    ]
    assert all(batch.mask.all() for batch in batches)
    found = torch.cat([batch.advantages for batch in batches]).flatten()
    torch.testing.assert_close(found.sort().values, torch.tensor(wanted).sort().values, rtol=0, atol=1e-8)
    assert learner.num_timesteps == sum(ledger.steps for ledger in real_ones)
    assert learner.policy.value_net[0].weight.grad is None
