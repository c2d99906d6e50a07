"""The algorithms as classes, for use from Python.

    from gym_baselines import PPO, evaluate
    agent = PPO("CartPole-v1", n_envs=8, seed=0, learning_rate=3e-4).learn(100_000)
    mean, std = evaluate(agent, episodes=100)
    agent.save("cartpole");  action = PPO.load("cartpole").predict(observation)

A class only chooses default settings; the settings alone decide what is computed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
from torch import nn

from gym_baselines.agent import Agent
from gym_baselines.callbacks import StepFunction
from gym_baselines.config import TrainConfig, with_settings
from gym_baselines.networks import ActorCritic
from gym_baselines.presets import preset
from gym_baselines.train import EnvLike, Training
from rlhf.commands.cli import from_plain
from rlhf.errors import InputError
from rlhf.runs.callbacks import Callback


class Baseline:
    """An agent that learns. Use one of the subclasses."""

    algorithm: ClassVar[str]

    def __init__(
        self,
        env: EnvLike = "CartPole-v1",
        *more: Any,
        features: Callable[[Any], nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        """env: a Gymnasium id, a function that makes one environment, or a vector environment.

        settings: any setting of TrainConfig and its groups (learning_rate, clip_range, hidden_sizes, ...), also under
        Stable-Baselines3's name if it means the same (n_envs, n_steps, batch_size, ...). The others come from the
        environment's preset, if it has one, else from the algorithm's defaults. features: makes, from the observation
        space, a module that replaces the networks' hidden layers.
        """
        name = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        if more or (isinstance(env, str) and env.endswith("Policy")):
            raise InputError(
                f"The environment comes first and settings by name, got {(env, *more)}: policies (Stable-Baselines3's "
                "'MlpPolicy') follow from the spaces here; see hidden_sizes, encoder, features."
            )
        if "algorithm" in settings:
            raise InputError(
                f"algorithm is fixed by the class, {self.algorithm}: use the class of the algorithm that you want."
            )
        if isinstance(env, gym.Env) and not isinstance(env, gym.vector.VectorEnv):
            raise InputError(
                "env is one environment, and several are needed: give its id, or a function that makes one."
            )
        if not isinstance(env, str) and not callable(env):
            held = getattr(env, "num_envs", 1)
            if settings.setdefault("n_envs" if "n_envs" in settings else "num_envs", held) != held:
                raise InputError(
                    f"The vector environment holds {held} environments: leave n_envs out, or set it to that."
                )
        self.config = preset(name, self.algorithm, **settings)
        self._env = env
        self._features = features
        self._training: Training | None = None
        self.agent: Agent | None = None

    def learn(
        self,
        total_steps: int | float | None = None,
        *,
        callbacks: Sequence[Callback | StepFunction] | Callback | StepFunction = (),
        progress_bar: bool | None = None,
        total_timesteps: int | float | None = None,
    ) -> Self:
        """Train for `total_steps` more environment steps and return self. None: as many as set, or as in the last call.

        A further call continues the training; the learning rate then falls over the new steps. With output_dir and
        resume=True, the first call instead continues an interrupted run, bit for bit. total_timesteps: another name of
        total_steps.
        """
        total_steps = total_timesteps if total_steps is None else total_steps
        if progress_bar is not None:
            self.config = with_settings(self.config, progress_bar=progress_bar)
        if total_steps is not None:
            self.config = with_settings(self.config, total_steps=total_steps)
        if self._training is None:
            self._training = Training(self.config, env=self._env, features=self._features, agent=self.agent)
            self.agent = self._training.agent
        else:
            self._training.prolong(self.config.total_steps)
        self._training.train(callbacks if isinstance(callbacks, Sequence) else [callbacks])
        return self

    @property
    def policy(self) -> ActorCritic:
        return self._trained().policy

    @property
    def num_timesteps(self) -> int:
        """Environment steps made so far."""
        return 0 if self.agent is None else self.agent.environment_steps

    def predict(self, observation: np.ndarray, *, deterministic: bool = True, **options: Any) -> np.ndarray:
        """The action for one observation, or one action per row of a batch; see Agent.predict."""
        return self._trained().predict(observation, deterministic=deterministic, **options)

    def save(self, directory: str | Path) -> None:
        """Save weights (safetensors), settings and normaliser statistics; see Agent.save."""
        self._trained().save(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        env: EnvLike | None = None,
        features: Callable[[Any], nn.Module] | None = None,
        **settings: Any,
    ) -> Self:
        """Load an agent from `save` or a run's output_dir, ready to predict or to learn further (with a new optimizer).

        Raises InputError if the files are damaged, not an agent's, or of another algorithm.
        """
        agent = Agent.load(directory, features=features)
        saved = from_plain(TrainConfig, agent.settings)
        if saved.algorithm != cls.algorithm:
            raise InputError(
                f"{directory} was trained by {saved.algorithm}, not by {cls.algorithm}: load it with the class of that "
                "name, or with Agent.load to use it only."
            )
        baseline = cls.__new__(cls)
        baseline.config = with_settings(saved, **settings)
        if baseline.config.network != saved.network:
            raise InputError(
                f"A saved agent keeps its networks: {baseline.config.network} was asked for, {saved.network} was saved. "
                "Train a new agent instead."
            )
        baseline._env = env or agent.env
        baseline._features = features
        baseline._training = None
        baseline.agent = agent
        return baseline

    def close(self) -> None:
        """Close the environments; the agent can still predict."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def _trained(self) -> Agent:
        if self.agent is None:
            raise InputError("There is no policy yet: call learn first, or load one.")
        return self.agent


class PPO(Baseline):
    """Proximal policy optimisation, clipped; with penalty_coef and surrogate="unclipped", PPO-Penalty."""

    algorithm = "ppo"


class PPOPenalty(Baseline):
    """PPO with an adaptive penalty on KL(old || policy) in place of the clip."""

    algorithm = "ppo_penalty"


class A2C(Baseline):
    """Advantage actor-critic, synchronous: PPO with one epoch over the whole rollout."""

    algorithm = "a2c"


class Reinforce(Baseline):
    """REINFORCE on whole episodes, with a learnt baseline or (baseline="none") without."""

    algorithm = "reinforce"


class TRPO(Baseline):
    """Trust region policy optimisation."""

    algorithm = "trpo"
