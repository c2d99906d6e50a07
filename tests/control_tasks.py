"""Control tasks small enough to know their optimal policy and its values, for the real training loop of gym_baselines.

Observations are one-hot and the networks have no hidden layer, so policy and values are tables. Rewards and limits are
chosen so that each rule of GAE about terminations, time limits and ghost steps decides what is learnt.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from gym_baselines.agent import Agent
from gym_baselines.config import TrainConfig
from gym_baselines.networks import NetworkConfig
from gym_baselines.train import train
from rlhf.algorithms.ppo import PPOConfig
from rlhf.training.update import UpdateConfig

GAMMA = 0.9


class Table(gym.Env):
    """`num_states` states, two actions; subclasses say what a step does."""

    num_states: int
    time_limit: int

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 1, (self.num_states,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.time, self.state = 0, self.first_state()
        return self.observe(), {}

    def step(self, action):
        reward, self.state, terminated = self.move(int(action))
        self.time += 1
        return self.observe(), reward, terminated, not terminated and self.time == self.time_limit, {}

    def observe(self) -> np.ndarray:
        return np.eye(self.num_states, dtype=np.float32)[self.state]

    def first_state(self) -> int:
        return 0

    def move(self, action: int) -> tuple[float, int, bool]:
        raise NotImplementedError


class StayOrLeave(Table):
    """Two states in turn: staying pays 2 in the first and 0 in the second, for ever; leaving pays 5 and ends the episode.

    Staying is worth V0 = 2 / (1 - gamma^2) = 10.5 and V1 = gamma V0 = 9.5, so it is right although a limit of 5 steps never
    lets an episode collect more than 2 + 2 gamma^2 + 2 gamma^4 = 4.9: only who bootstraps at the limit can know.
    Who bootstraps after leaving too, thinks that leaving is worth 5 + gamma V.
    """

    num_states, time_limit = 2, 5

    def first_state(self) -> int:
        return int(self.np_random.integers(2))

    def move(self, action: int) -> tuple[float, int, bool]:
        if action == 1:
            return 5.0, 1 - self.state, True
        return (2.0 if self.state == 0 else 0.0), 1 - self.state, False

    values = torch.tensor([2 / (1 - GAMMA**2), 2 * GAMMA / (1 - GAMMA**2)])


class Bonus(Table):
    """The first step of an episode pays 10, the four others nothing, and all look alike; actions do not matter.

    With lambda 1 the return of a step with j more before the limit is its rewards + gamma^(j + 1) V, and V is the mean of
    these: V = 10 / 5 + V (gamma + ... + gamma^5) / 5. Who lets advantages leak over the limit sees the next bonus too.
    """

    num_states, time_limit = 1, 5

    def move(self, action: int) -> tuple[float, int, bool]:
        return (10.0 if self.time == 0 else 0.0), 0, False

    values = torch.tensor([2 / (1 - sum(GAMMA**j for j in range(1, 6)) / 5)])


class Nothing(Table):
    """No reward, ever: only the entropy bonus is left to follow, and it leads to the uniform policy."""

    num_states, time_limit = 2, 5

    def move(self, action: int) -> tuple[float, int, bool]:
        return 0.0, 1 - self.state, False


class Switches(Table):
    """Eight states in turn, each with its own right action; it pays 10, the other one 9."""

    num_states, time_limit = 8, 4

    def first_state(self) -> int:
        return int(self.np_random.integers(8))

    def move(self, action: int) -> tuple[float, int, bool]:
        return (10.0 if action == self.state % 2 else 9.0), (self.state + 1) % 8, False


class Constant(Table):
    """Every step pays 5; with gamma 0 that is the value, exactly, and nothing is left to noise."""

    num_states, time_limit = 1, 5

    def move(self, action: int) -> tuple[float, int, bool]:
        return 5.0, 0, False


@dataclass(frozen=True)
class Result:
    probabilities: Tensor
    """(states, actions) of the policy in the end."""
    values: Tensor
    """(updates, states)."""
    kl: list[float]
    """Exact KL(old || new) of every update, mean over states."""
    history: list[dict[str, float]]


def run(env: Callable[[], Table], updates: int, *, ppo: dict[str, Any] | None = None, **settings: Any) -> Result:
    """Train on `env` with small batches; `ppo` and `settings` change PPOConfig and TrainConfig."""
    states = torch.eye(env.num_states)  # type: ignore[attr-defined]
    history: list[dict[str, float]] = []
    policies: list[Tensor] = []
    values: list[Tensor] = []

    def record(agent: Agent, metrics: dict[str, float]) -> bool:
        history.append(metrics)
        with torch.no_grad():
            policies.append(agent.policy.policy_net(states).double().log_softmax(-1))
            values.append(agent.policy.values(states))
        return len(history) < updates

    num_envs, rollout_steps = settings.pop("num_envs", 8), settings.pop("rollout_steps", 30)
    config = TrainConfig(
        env=env.__name__,  # type: ignore[attr-defined]
        total_steps=updates * num_envs * rollout_steps,
        num_envs=num_envs,
        rollout_steps=rollout_steps,
        network=NetworkConfig(hidden_sizes=()),
        progress_bar=False,
        ppo=replace(
            PPOConfig(kl_coef=0.0, gamma=GAMMA, gae_lambda=1.0, value_coef=1.0, value_clip_range=None), **(ppo or {})
        ),
        **{
            "learning_rate": 0.1,
            "update": UpdateConfig(num_epochs=4, minibatch_size=num_envs * rollout_steps, max_grad_norm=1e9),
            **settings,
        },
    )
    train(config, env=env, callbacks=[record])
    kl = [float((old.exp() * (old - new)).sum(-1).mean()) for old, new in itertools.pairwise(policies)]
    return Result(policies[-1].exp(), torch.stack(values), kl, history)
