"""How good a policy is: complete episodes from start states that training never saw."""

from typing import NamedTuple

import numpy as np
import torch

from gym_baselines.environments import EVALUATION as FOR_EVALUATION
from gym_baselines.environments import EnvFactory, make_env
from gym_baselines.networks import CategoricalPolicy
from rlhf.core.random import EVALUATION, uniform
from rlhf.errors import InputError


class Evaluation(NamedTuple):
    """Undiscounted returns of complete episodes."""

    returns: np.ndarray
    lengths: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        return float(self.returns.std())

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.std:.1f} (min {self.returns.min():.1f}, {len(self.returns)} episodes)"


@torch.inference_mode()
def evaluate(
    policy: CategoricalPolicy, env: str | EnvFactory, *, episodes: int = 100, seed: int = 0, greedy: bool = True
) -> Evaluation:
    """Play `episodes` episodes, one per environment, so that short ones are not over-represented.

    greedy: the most likely action; otherwise actions are drawn, a pure function of (seed, episode, step).
    An environment that has finished is not stepped again, and costs no forward.
    """
    if episodes < 1:
        raise InputError(f"episodes must be at least 1, got {episodes}.")
    envs = [make_env(env, seed=seed, row=row, purpose=FOR_EVALUATION) for row in range(episodes)]
    first_action = int(getattr(envs[0].action_space, "start", 0))
    device = next(policy.parameters()).device
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    observations = np.stack([env.reset()[0] for env in envs])
    running = np.arange(episodes)
    step = 0
    while len(running):
        rows = torch.from_numpy(observations[running]).to(device, policy.dtype)
        if greedy:
            actions = policy.greedy(rows)
        else:
            actions, _ = policy.sample(rows, uniform(seed, EVALUATION, step, torch.from_numpy(running)).to(device))
        over = np.zeros(len(running), dtype=bool)
        for place, (episode, action) in enumerate(zip(running, actions.tolist(), strict=True)):
            observations[episode], reward, terminated, truncated, _ = envs[episode].step(action + first_action)
            returns[episode] += float(reward)
            over[place] = terminated or truncated
        lengths[running] += 1
        running = running[~over]
        step += 1
    for played in envs:
        played.close()
    return Evaluation(returns, lengths)
