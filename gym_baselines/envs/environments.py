"""Makes environments for training and evaluation: checked, every reset seeded, never rendered in training."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FrameStackObservation, TimeLimit

from gym_baselines.envs.atari import prepare_atari
from gym_baselines.envs.making import EnvFactory, flatten, make_by, make_registered
from gym_baselines.envs.pool import is_pool, make_pool
from gym_baselines.envs.resets import EVALUATION, TRAINING, SeededResets, start_seeds
from gym_baselines.envs.spaces import action_family, check_spaces_supported
from gym_baselines.envs.vector import (
    AUTORESET_MODES,
    action_masks,
    as_vector_env,
    autoreset_mode,
    finished_games,
    replay,
    replay_records,
    replays,
    reports_games,
)
from rlhf.errors import InputError
from rlhf.settings import check_types

Vectorization = Literal["sync", "async", "envpool"]
Autoreset = Literal["next_step", "same_step", "disabled"]


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """How environments are made and stepped. (Which environment it is, the setting `env` says.)"""

    vectorization: Vectorization = "sync"
    """Step environments one after the other, in a process each (pays only if they are slow), or by EnvPool in C++."""
    autoreset: Autoreset = "next_step"
    """When an environment restarts. All modes give the same transitions; next_step adds a masked step per episode."""
    max_episode_steps: int | None = None
    """Truncate an episode (in Atari: a game) after this many steps; null keeps the environment's own limit."""
    frame_stack: int | None = None
    """How many of the last observations are stacked into one; null means 4 for an Atari game, else 1."""
    flatten: bool = False
    """Turn observations of any fixed size (Discrete, Dict, Tuple, ...) into one vector."""
    action_masks: bool = False
    """Use info["action_mask"], which every reset and step must then give: true for each action that is allowed next."""
    atari: bool = False
    """Prepare an ALE game as in the DQN paper: 4 frames per step, grey 84 x 84, lives as episodes, signs as rewards."""
    sticky_actions: float = 0.0
    """Probability of repeating the last action instead of the chosen one: 0 in most PPO papers; the ALE advises 0.25."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_episode_steps", "frame_stack"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, or null, got {value}.")
        if not 0 <= self.sticky_actions <= 1:
            raise InputError(f"sticky_actions is a probability and must lie in [0, 1], got {self.sticky_actions}.")
        if self.sticky_actions and not self.atari:
            raise InputError("sticky_actions is for Atari games only: set atari to true, or sticky_actions to 0.")
        if self.vectorization == "envpool":
            self._check_pool()

    @property
    def frames(self) -> int:
        """Observations in one stack."""
        return self.frame_stack or (4 if self.atari else 1)

    def _check_pool(self) -> None:
        if self.autoreset != "next_step":
            raise InputError(f"vectorization = 'envpool' needs autoreset = 'next_step', got {self.autoreset!r}.")
        for name in ("flatten", "action_masks"):
            if getattr(self, name):
                raise InputError(f"{name} is not possible with vectorization = 'envpool': choose 'sync' or 'async'.")
        if self.frames > 1 and not self.atari:
            raise InputError(
                f"vectorization = 'envpool' stacks frames of Atari games only, but frame_stack is {self.frames}: choose "
                "vectorization 'sync' or 'async'."
            )


def make_env(
    env: str | EnvFactory,
    *,
    seed: int,
    row: int,
    purpose: int = TRAINING,
    options: EnvironmentConfig | None = None,
    render_mode: str | None = None,
) -> SeededResets:
    """Make one environment with seeded resets.

    Args:
        env: A Gymnasium id, or a function that makes one environment.
        seed: Seed of the start states, together with row and purpose.
        row: Global index of the environment.
        purpose: TRAINING or EVALUATION. EVALUATION plays whole Atari games with their own rewards, from start states
            that training never uses.
        options: How to make it; the defaults if None.
        render_mode: For a video. Allowed in EVALUATION only: in training it would cost time for nothing.
    """
    options = options or EnvironmentConfig()
    if isinstance(env, str):
        settings: dict[str, Any] = {"max_episode_steps": options.max_episode_steps}
        if options.atari:
            settings = {"frameskip": 1, "repeat_action_probability": 0.0}
        made = make_registered(env, atari=options.atari, render_mode=render_mode, **settings)
    else:
        made = make_by(env)
        if options.max_episode_steps is not None and not options.atari:
            made = TimeLimit(made, options.max_episode_steps)
    shown = getattr(made, "render_mode", None)
    if shown is not None and purpose == TRAINING:
        made.close()
        raise InputError(
            f"The environment has render_mode={shown!r}, which slows training (some environments several "
            "times) for nothing: make it without. Record videos of the saved agent, in evaluation."
        )
    if options.atari:
        made = prepare_atari(
            made,
            learning=purpose == TRAINING,
            sticky_actions=options.sticky_actions,
            max_episode_steps=options.max_episode_steps,
        )
    if options.flatten:
        made = flatten(made)
    if options.frames > 1:
        made = FrameStackObservation(made, options.frames)
    return SeededResets(made, seed=seed, row=row, purpose=purpose)


def make_vector_env(
    env: str | EnvFactory | VectorEnv,
    *,
    rows: Sequence[int],
    seed: int,
    options: EnvironmentConfig | None = None,
    purpose: int = TRAINING,
    autoreset: Autoreset | None = None,
) -> VectorEnv:
    """Make the environments of this process.

    Args:
        env: A Gymnasium id, a function that makes one environment, or a vector environment, which must hold as many
            environments as there are rows.
        rows: Global row index of each environment.
        seed: Seed of the start states.
        options: How to make them; the defaults if None.
        purpose: See `make_env`.
        autoreset: Replaces the mode in `options`.

    Raises:
        InputError: The environment is not supported.
    """
    options = options or EnvironmentConfig()
    if autoreset is not None:
        options = replace(options, autoreset=autoreset)
    if len(rows) == 0:
        raise InputError(
            "This process would hold no environment: num_envs must be at least the number of processes. Raise it (and "
            "lower rollout_steps, to keep their product), or start fewer processes."
        )
    if isinstance(env, VectorEnv) or is_pool(env):
        given = as_vector_env(env, seed=seed, first_row=rows[0])
        if given.num_envs != len(rows):
            raise InputError(
                f"The vector environment holds {given.num_envs} environments, but this process is to play {len(rows)}: "
                "set num_envs to the number it holds, and use one process."
            )
        return given
    if options.vectorization == "envpool":
        return _make_pool(env, rows=rows, seed=seed, options=options, purpose=purpose)
    check_environment(env, options)
    factories = [partial(make_env, env, seed=seed, row=row, purpose=purpose, options=options) for row in rows]
    mode = AUTORESET_MODES[options.autoreset]
    # copy=False: the collector copies observations into its own buffers anyway.
    envs: Any
    if options.vectorization == "async":
        factories = [partial(_in_worker, factory, os.getpid()) for factory in factories]
        envs = AsyncVectorEnv(factories, copy=False, autoreset_mode=mode)
    else:
        envs = SyncVectorEnv(factories, copy=False, autoreset_mode=mode)
        if len({id(single.unwrapped) for single in envs.envs}) < len(rows):
            raise InputError(
                "env gave the same environment twice: it must be a function that makes a new one each time."
            )
    envs.replays = True
    envs.reports_games = envs.call("reports_games")[0]
    return envs


def _in_worker(factory: Callable[[], gym.Env], trainer: int) -> gym.Env:
    """Makes the environment, in a worker that leaves Ctrl-C to the trainer: the terminal sends it to all processes."""
    if os.getpid() != trainer:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return factory()


def check_environment(
    env: str | EnvFactory | VectorEnv, options: EnvironmentConfig | None = None
) -> tuple[gym.Space, gym.Space]:
    """Make and reset one environment as training will; returns its spaces. Raises InputError if it is unusable."""
    options = options or EnvironmentConfig()
    name = env if isinstance(env, str) else "the environment"
    if isinstance(env, VectorEnv) or is_pool(env):
        given = as_vector_env(env)
        check_spaces_supported(given.single_observation_space, given.single_action_space, "the vector environment")
        return given.single_observation_space, given.single_action_space
    if options.vectorization == "envpool":
        pool = _make_pool(env, rows=[0], seed=0, options=options, purpose=TRAINING)
        pool.close()
        return pool.single_observation_space, pool.single_action_space
    probe = make_env(env, seed=0, row=0, options=options)
    try:
        check_spaces_supported(probe.observation_space, probe.action_space, name)
        _check_reset(probe, name, options)
    finally:
        probe.close()
    return probe.observation_space, probe.action_space


def _check_reset(env: SeededResets, name: str, options: EnvironmentConfig) -> None:
    try:
        observation, info = env.reset()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} fails in its reset, which must take seed and options and return (observation, info), as Gymnasium's "
            f"do: {type(error).__name__}: {error}"
        ) from error
    if np.shape(observation) != env.observation_space.shape:
        raise InputError(
            f"{name} gives observations of the shape {np.shape(observation)}, but its observation_space says "
            f"{env.observation_space}."
        )
    if options.action_masks:
        _check_mask(env.action_space, info, name)


def _check_mask(actions: gym.Space, info: dict[str, Any], name: str) -> None:
    family = action_family(actions)
    if not family.is_discrete:
        raise InputError(
            f"action_masks is true, but {name} has the action space {actions}, which has no choices to mask."
        )
    if "action_mask" not in info:
        raise InputError(
            f"action_masks is true, but the info of {name}'s reset has no 'action_mask'. Add it there and in step (true "
            "for each allowed action), or set action_masks to false."
        )
    if np.shape(info["action_mask"]) != (family.num_params,):
        raise InputError(
            f"info['action_mask'] of {name} has the shape {np.shape(info['action_mask'])}, but {actions} needs "
            f"{(family.num_params,)}: one entry for each choice, those of several choices one after the other."
        )


def _make_pool(
    env: str | EnvFactory, *, rows: Sequence[int], seed: int, options: EnvironmentConfig, purpose: int
) -> VectorEnv:
    if not isinstance(env, str):
        raise InputError("vectorization = 'envpool' needs the id of one of EnvPool's environments, not a function.")
    learning = purpose == TRAINING
    atari = {
        "stack_num": options.frames,
        "frame_skip": 4,
        "noop_max": 30,
        "use_fire_reset": True,
        "episodic_life": learning,
        "reward_clip": learning,
        "repeat_action_probability": options.sticky_actions,
    }
    limit = {} if options.max_episode_steps is None else {"max_episode_steps": options.max_episode_steps}
    pool = make_pool(env, seeds=start_seeds(seed, rows, purpose), **limit, **(atari if options.atari else {}))
    pool.take_spaces(*_registered_spaces(env, options))
    check_spaces_supported(pool.single_observation_space, pool.single_action_space, f"EnvPool's {env}")
    return pool


def _registered_spaces(name: str, options: EnvironmentConfig) -> tuple[gym.Space, gym.Space] | tuple[None, None]:
    """Gymnasium's spaces for the id, if it is installed. Not for games, whose spaces are equal and slow to get."""
    if options.atari:
        return None, None
    try:
        known = make_env(name, seed=0, row=0, options=replace(options, vectorization="sync"))
    except InputError:
        return None, None
    known.close()
    return known.observation_space, known.action_space


__all__ = [
    "EVALUATION",
    "TRAINING",
    "Autoreset",
    "EnvFactory",
    "EnvironmentConfig",
    "SeededResets",
    "Vectorization",
    "action_masks",
    "as_vector_env",
    "autoreset_mode",
    "check_environment",
    "finished_games",
    "make_env",
    "make_vector_env",
    "replay",
    "replay_records",
    "replays",
    "reports_games",
]
