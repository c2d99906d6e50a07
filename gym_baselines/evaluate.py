"""Evaluates a policy on complete episodes, from start states that training never uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from gym_baselines.agent import Agent, allows_something
from gym_baselines.envs.environments import EVALUATION as FOR_EVALUATION
from gym_baselines.envs.environments import EnvFactory, EnvironmentConfig, SeededResets, make_env
from gym_baselines.envs.spaces import are_alike
from gym_baselines.networks import ActorCritic
from rlhf.core.random import EVALUATION, uniform
from rlhf.errors import InputError, TrainingError

_LONGEST_EPISODE = 1_000_000  # steps; longer ones probably never end


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Undiscounted returns of complete episodes, in the order of their start states: `mean, std = evaluate(...)`."""

    returns: np.ndarray
    lengths: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation over episodes (ddof 0), not the standard error of the mean."""
        return float(self.returns.std())

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.std))

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.std:.1f} (min {self.returns.min():.1f}, {len(self.returns)} episodes)"


@torch.inference_mode()
def evaluate(
    agent: Any,
    env: str | EnvFactory | None = None,
    *,
    episodes: int = 100,
    seed: int = 0,
    greedy: bool = True,
    options: EnvironmentConfig | None = None,
    num_envs: int = 100,
) -> Evaluation:
    """Play complete episodes, one from each start state, so that short ones are not over-represented.

    In Atari an episode is a whole game.

    Args:
        agent: An `Agent`, a learning algorithm such as `PPO`, or a bare policy.
        env: An id or a function that makes one environment; if None, the environment of the agent's training.
        episodes: Number of episodes.
        seed: Seed of start states and sampled actions.
        greedy: Take the most likely actions. Otherwise sample them, as a pure function of (seed, episode, step).
        options: How environments are made; if None, as in the agent's training.
        num_envs: How many environments are open at a time; affects only memory and speed.

    Raises:
        InputError: The environment is unknown, or does not fit the policy.
        TrainingError: A reward or an observation is not finite, or an action mask allows nothing.
    """
    for name, number in (("episodes", episodes), ("num_envs", num_envs)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}.")
    agent = getattr(agent, "agent", agent)  # PPO and its siblings hold an Agent
    if isinstance(agent, Agent):
        options = options or agent.environment_config()
        env = env or agent.make_env or agent.env
        policy = agent.policy
    elif isinstance(agent, ActorCritic):
        policy = agent
    else:
        raise InputError(f"evaluate needs a trained agent or a policy, got {agent!r:.200}.")
    if isinstance(agent, Agent) and env == agent.env and env not in gym.registry and "/" not in str(env):
        raise InputError(
            f"The agent was trained on an environment of your own ({env}), which was not saved with it, or on a vector "
            "environment: pass env, a function that makes one."
        )
    if env is None:
        raise InputError("A bare policy does not know its environment: pass env, an id or a function that makes one.")
    return _Games(policy, env, options or EnvironmentConfig(), seed, greedy).play(episodes, num_envs)


class _Episode:
    """One environment and the state of its running episode."""

    def __init__(self, env: SeededResets, number: int) -> None:
        self.env = env
        self.number = number
        self.total = 0.0
        self.length = 0
        self.observation, self.info = env.reset()

    def step(self, action: Any) -> bool:
        """Make one step; True if it was the last. If whole games are reported, a lost life does not end the episode."""
        self.observation, reward, terminated, truncated, self.info = self.env.step(action)
        self.length += 1
        self.total += float(reward)
        if not isfinite(self.total):
            raise self.not_finite("reward", reward)
        if self.length > _LONGEST_EPISODE:
            raise InputError(
                f"Evaluation episode {self.number} has not ended after {_LONGEST_EPISODE} steps: give the environment a "
                "time limit with max_episode_steps."
            )
        if not self.env.reports_games:
            return bool(terminated or truncated)
        if (terminated or truncated) and "game_return" not in self.info:
            self.observation, self.info = self.env.reset()
        if "game_return" not in self.info:
            return False
        self.total = float(self.info["game_return"])
        self.length = int(self.info.get("game_length", self.length))
        return True

    def not_finite(self, what: str, value: Any) -> TrainingError:
        return TrainingError(
            f"The {what} of evaluation episode {self.number} is not finite ({value}) after {self.length} steps. Look for a "
            "division by zero or a diverging simulation in the environment."
        )


class _Games:
    """Plays several episodes at once, with one forward per step for all of them."""

    def __init__(
        self, policy: ActorCritic, env: str | EnvFactory, options: EnvironmentConfig, seed: int, greedy: bool
    ) -> None:
        self.policy = policy
        self.env = env
        self.options = options
        self.seed = seed
        self.greedy = greedy
        self.parts = torch.arange(policy.num_draws)

    def play(self, episodes: int, num_envs: int) -> Evaluation:
        returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
        waiting = iter(range(episodes))
        running: list[_Episode] = []
        try:
            while True:
                while len(running) < num_envs and (number := next(waiting, None)) is not None:
                    running.append(self._start(number))
                if not running:
                    return Evaluation(returns, lengths)
                going_on = []
                for episode, action in zip(running, self._actions(running), strict=True):
                    if not episode.step(action):
                        going_on.append(episode)
                        continue
                    returns[episode.number], lengths[episode.number] = episode.total, episode.length
                    episode.env.close()
                running = going_on
        finally:
            for episode in running:
                episode.env.close()

    def _start(self, number: int) -> _Episode:
        env = make_env(self.env, seed=self.seed, row=number, purpose=FOR_EVALUATION, options=self.options)
        for name in ("observation_space", "action_space"):
            ours, theirs = getattr(self.policy, name), getattr(env, name)
            if not are_alike(ours, theirs):
                env.close()
                raise InputError(f"The {name} of env is {theirs}, but the policy was made for {ours}.")
        return _Episode(env, number)

    def _actions(self, running: list[_Episode]) -> np.ndarray:
        """Actions for the present observations, as the environments take them."""
        observations = np.stack([episode.observation for episode in running])
        if observations.dtype.kind == "f" and not np.isfinite(observations).all():
            episode = next(e for e in running if not np.isfinite(e.observation).all())
            raise episode.not_finite("observation", episode.observation)
        policy = self.policy
        rows = torch.from_numpy(observations)
        rows = rows.to(policy.device, policy.dtype if rows.is_floating_point() else rows.dtype)
        mask = self._mask(running)
        if self.greedy:
            return policy.env_actions(policy.greedy(rows, mask))
        steps, numbers = (torch.tensor([getattr(e, name) for e in running])[:, None] for name in ("length", "number"))
        draws = uniform(self.seed, EVALUATION, steps, numbers, self.parts).to(policy.device)
        return policy.env_actions(policy.sample(rows, draws, mask)[0])

    def _mask(self, running: list[_Episode]) -> torch.Tensor | None:
        """The action masks in the infos, if options.action_masks is true; otherwise None."""
        if not self.options.action_masks:
            return None
        missing = [episode.number for episode in running if "action_mask" not in episode.info]
        if missing:
            raise InputError(
                f"action_masks is true, but episode {missing[0]} gave no info['action_mask'] in some step."
            )
        mask = torch.from_numpy(np.stack([episode.info["action_mask"] for episode in running]).astype(bool))
        if not allows_something(mask, self.policy):
            raise TrainingError("info['action_mask'] of an evaluation episode allows no action at all.")
        return mask.to(self.policy.device)
