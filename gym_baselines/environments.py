"""Environments as the collector wants them: seeded reset by reset, never rendered, checked before the first step."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from rlhf.core.random import ENV_RESET, uniform
from rlhf.errors import InputError

EnvFactory = Callable[[], gym.Env]
Autoreset = Literal["next_step", "same_step"]

AUTORESET_MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}
TRAINING, EVALUATION = 0, 1  # what an environment is for: evaluation never sees the start states of training

_SEEDS_AT_ONCE = 32  # one vectorised draw gives the seeds of this many episodes


class SeededResets(gym.Wrapper):
    """Every reset, the automatic ones too, is seeded by (seed, row, episode) alone.

    So an episode does not depend on what was played before it or beside it, and can be replayed from its actions.
    """

    def __init__(self, env: gym.Env, *, seed: int, row: int, purpose: int = TRAINING) -> None:
        super().__init__(env)
        self.episode = -1
        self._key = (seed, row, purpose)
        self._seeds: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        return self.env.reset(seed=self._next_seed() if seed is None else seed, options=options)

    def _next_seed(self) -> int:
        block, place = divmod(self.episode, _SEEDS_AT_ONCE)
        if place == 0 or not self._seeds:
            seed, row, purpose = self._key
            episodes = torch.arange(block * _SEEDS_AT_ONCE, (block + 1) * _SEEDS_AT_ONCE)
            self._seeds = (uniform(seed, ENV_RESET, row, episodes, purpose) * 2**31).long().tolist()
        return self._seeds[place]


def make_env(env: str | EnvFactory, *, seed: int, row: int, purpose: int = TRAINING) -> gym.Env:
    """One environment with seeded resets, from a Gymnasium id or a function that makes one. Never with a render mode."""
    made = _make_registered(env) if isinstance(env, str) else env()
    if not isinstance(made, gym.Env):
        raise InputError(
            f"env must be a Gymnasium id or a function that returns a gymnasium.Env, but it gave {made!r}."
        )
    return SeededResets(made, seed=seed, row=row, purpose=purpose)


def make_vector_env(
    env: str | EnvFactory, *, rows: Sequence[int], seed: int, autoreset: Autoreset = "next_step"
) -> VectorEnv:
    """This process's environments: one for each global row index in `rows`. Raises InputError for what is not supported."""
    if autoreset not in AUTORESET_MODES:
        raise InputError(f"autoreset must be one of {', '.join(AUTORESET_MODES)}, got {autoreset!r}.")
    if len(rows) == 0:
        raise InputError("This process would hold no environment: num_envs must be at least the number of processes.")
    check_spaces(env)
    factories = [lambda row=row: make_env(env, seed=seed, row=row) for row in rows]
    # The collector copies observations into its own buffers, so the environments need not copy them once more.
    return SyncVectorEnv(factories, copy=False, autoreset_mode=AUTORESET_MODES[autoreset])


def check_spaces(env: str | EnvFactory) -> tuple[Box, Discrete]:
    """Observation and action space of `env`; InputError if they are not Box and Discrete."""
    probe = make_env(env, seed=0, row=0)
    observations, actions = probe.observation_space, probe.action_space
    probe.close()
    check_supported(observations, actions, env if isinstance(env, str) else "the environment")
    return observations, actions  # type: ignore[return-value]


def check_supported(observations: gym.Space, actions: gym.Space, name: str) -> None:
    """Refuse a space that no policy here can handle, by its name."""
    if not isinstance(observations, Box):
        raise InputError(
            f"{name} has the observation space {observations}, but only Box is supported. "
            "Wrap it in gymnasium.wrappers.FlattenObservation, which turns any fixed-size space into a Box."
        )
    if not (np.issubdtype(observations.dtype, np.number) or observations.dtype == np.bool_):
        raise InputError(f"{name} has observations of type {observations.dtype}; numbers are needed.")
    if not isinstance(actions, Discrete):
        raise InputError(
            f"{name} has the action space {actions}, but only Discrete is supported so far. "
            "Choose an environment with discrete actions, or wrap it in one that offers a finite choice."
        )


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """How the vector environment resets; InputError unless the collector knows what its steps then mean."""
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode) or mode not in AUTORESET_MODES.values():
        known = ", ".join(str(mode) for mode in AUTORESET_MODES.values())
        raise InputError(
            f"The vector environment's metadata['autoreset_mode'] is {mode!r}, but only {known} are known here: which "
            "steps are real and which observation ends an episode depends on it. Build it with autoreset_mode=NEXT_STEP."
        )
    return mode


def _make_registered(name: str) -> gym.Env:
    try:
        return gym.make(name, disable_env_checker=True)
    except gym.error.DependencyNotInstalled as error:
        raise InputError(f"env {name} needs a package that is missing: {error}") from error
    except gym.error.Error as error:
        known = difflib.get_close_matches(name, gym.registry, n=1, cutoff=0.0)
        raise InputError(f"env {name!r} is not known to Gymnasium. Did you mean {known[0]!r}?") from error
