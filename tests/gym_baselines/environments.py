"""Small environments whose exact values are known by arithmetic, and policies that report exactly those values."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gym_baselines.collect import Collector
from gym_baselines.envs.environments import make_vector_env
from rlhf.core.distributions import Categorical
from rlhf.types import PolicyOutputs


class Clock(gym.Env):
    """The observation is the number of steps since the reset; rewards and ends are functions of it alone.

    rewards: reward of the step taken at time t. limit: truncated when the clock reaches it. death: terminated there.
    """

    observation_space = Box(0, np.inf, (1,), np.float64)
    action_space = Discrete(2)

    def __init__(self, reward=lambda t: 1.0, limit=None, death=None):
        self.reward, self.limit, self.death, self.t = reward, limit, death, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0]), {}

    def step(self, action):
        reward, self.t = self.reward(self.t), self.t + 1
        return np.array([float(self.t)]), reward, self.t == self.death, self.t == self.limit, {}


class Oracle:
    """Acts at random and knows the value of every state."""

    dtype = torch.float64
    family = Categorical(2)

    def __init__(self, value):
        self.value = value  # time (tensor), or whole observations if they are longer, -> V

    def __call__(self, inputs, actions, with_values, with_entropy):
        return PolicyOutputs(
            logprobs=torch.full(actions.shape, 0.5, dtype=self.dtype).log(),
            values=self.values(inputs["observations"]).unsqueeze(1),
        )

    def sample(self, observations, draws, action_mask=None):
        return (draws[:, 0] >= 0.5).long(), torch.full_like(draws[:, 0], 0.5).log()

    def env_actions(self, actions):
        return actions.numpy()

    def values(self, observations):
        return self.value(observations[:, 0] if observations.shape[1] == 1 else observations)


class Identity(gym.Env):
    """Name the symbol that is shown: +1 if right, 10 symbols per episode. The optimum is 10, chance gives 10/3."""

    observation_space = Box(0, 1, (3,), np.float32)
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = 0
        return self._show(), {}

    def step(self, action):
        reward = float(action == self.symbol)
        self.shown += 1
        return self._show(), reward, False, self.shown == 10, {}

    def _show(self):
        self.symbol = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.symbol]


def clocks(make_env, autoreset, num_envs=2):
    """A vector of environments in the given autoreset mode, through Gymnasium's own vectorisation."""
    if isinstance(autoreset, AutoresetMode):
        return SyncVectorEnv([make_env] * num_envs, autoreset_mode=autoreset)
    return make_vector_env(make_env, rows=range(num_envs), seed=0, autoreset=autoreset)


def rollouts(make_env, value, autoreset, *, lengths, num_envs=2):
    """The trajectories of consecutive rollouts of the given lengths, scored with the exact value function."""
    collector = Collector(clocks(make_env, autoreset, num_envs), Oracle(value), seed=0)
    return [collector.collect(length).trajectories for length in lengths]


def transitions(all_trajectories, row):
    """What really happened in one environment: (observation, action, reward, V', terminated, end) of each real step."""
    found = []
    for trajectories in all_trajectories:
        for t in trajectories.mask[row].nonzero().flatten().tolist():
            fields = ("actions", "rewards", "next_values", "terminated", "episode_ends")
            numbers = [getattr(trajectories, name)[row, t].item() for name in fields]
            found.append((*trajectories.inputs["observations"][row, t].tolist(), *numbers))
    return found
