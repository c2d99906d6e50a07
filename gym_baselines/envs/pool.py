"""Adapts EnvPool's environments, which are stepped in C++, to a Gymnasium vector environment."""

import difflib
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv

from rlhf.errors import InputError


class EnvPoolVectorEnv(VectorEnv):
    """EnvPool (Weng et al. 2022): environments in C++, stepped by EnvPool's threads, with autoreset mode NEXT_STEP.

    If an episode terminates in the very step of its time limit, EnvPool reports only the truncation, so in that case
    the value after the end counts. States of the environments cannot be restored.
    """

    replays = False

    def __init__(self, pool: Any) -> None:
        """pool: the result of envpool.make(..., env_type="gymnasium")."""
        config = pool.config
        if config["batch_size"] not in (0, config["num_envs"]):
            raise InputError(
                f"The EnvPool gives {config['batch_size']} of its {config['num_envs']} environments at a time: make it "
                "without batch_size, so that a step moves all of them."
            )
        self.pool = pool
        self.num_envs = int(config["num_envs"])
        self._announce(pool.observation_space, pool.action_space)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = None
        self.reports_games = "episodic_life" in config  # Atari: infos hold the true reward and the end of the game
        self._ghosts = np.zeros(self.num_envs, dtype=bool)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def take_spaces(self, observations: gym.Space | None, actions: gym.Space | None) -> None:
        """Use these spaces (Gymnasium's) instead of the pool's own if they hold the same kind of values.

        Some of EnvPool's spaces have other bounds or precisions; with Gymnasium's, an agent can play in both.
        """
        if observations is None or actions is None:
            return
        if _same_values(observations, self.single_observation_space) and _same_values(
            actions, self.single_action_space
        ):
            self._announce(observations, actions)

    def _announce(self, observations: gym.Space, actions: gym.Space) -> None:
        self.single_observation_space, self.single_action_space = observations, actions
        self.observation_space = gym.vector.utils.batch_space(observations, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(actions, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise InputError(
                f"EnvPool cannot reset with options ({', '.join(options)}): its environments only restart."
            )
        self._ghosts[:] = False
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return self.pool.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self.pool.step(
            np.ascontiguousarray(actions, dtype=self.pool.action_space.dtype)
        )
        if self.reports_games:
            game_over = infos["terminated"].astype(bool)
            terminated = terminated | game_over
            self._add_games(infos, game_over | truncated)
        self._ghosts = terminated | truncated
        return observations, rewards.astype(np.float64), terminated, truncated, infos

    def close(self, **kwargs: Any) -> None:
        self.pool.close()

    def _add_games(self, infos: dict[str, Any], over: np.ndarray) -> None:
        self._returns += infos["reward"]  # the true reward, neither clipped nor per life
        self._lengths += ~self._ghosts
        if over.any():
            infos |= {"game_return": self._returns.copy(), "game_length": self._lengths.copy(), "_game_return": over}
            self._returns[over], self._lengths[over] = 0.0, 0


def make_pool(name: str, *, seeds: Sequence[int], **settings: Any) -> EnvPoolVectorEnv:
    """Make EnvPool's environment `name`, one instance per seed."""
    try:
        import envpool
    except ImportError as error:
        raise InputError("vectorization = 'envpool' needs a package that is missing: pip install envpool") from error
    name = name.removeprefix("ALE/")  # EnvPool knows the games without Gymnasium's prefix
    known = envpool.list_all_envs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(
            f"env {name!r} is not known to EnvPool. Did you mean {near!r}? Or set vectorization to 'sync'."
        )
    try:
        pool = envpool.make(name, env_type="gymnasium", num_envs=len(seeds), seed=list(seeds), **settings)
    except TypeError as error:
        raise InputError(f"EnvPool's {name} does not take these settings: {error}") from error
    return EnvPoolVectorEnv(pool)


def is_pool(envs: Any) -> bool:
    """Whether `envs` is an EnvPool, judged by its classes' modules, since they have no common public base."""
    if not any(base.__module__.startswith("envpool.") for base in type(envs).__mro__):
        return False
    if not isinstance(getattr(envs, "observation_space", None), gym.Space):
        raise InputError(
            "The EnvPool is not of type 'gymnasium': make it with envpool.make(..., env_type='gymnasium')."
        )
    return True


def _same_values(space: gym.Space, other: gym.Space) -> bool:
    if isinstance(space, Discrete) and isinstance(other, Discrete):
        return (space.n, space.start) == (other.n, other.start)
    return isinstance(space, Box) and isinstance(other, Box) and space.shape == other.shape
