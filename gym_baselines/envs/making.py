"""Makes one environment from an id or a function, with a clear error message if that fails."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import FlattenObservation

from rlhf.errors import InputError

EnvFactory = Callable[[], gym.Env]

_PACKAGES = {  # part of the environment's entry point -> packages to install
    "envs.box2d": "'gymnasium[box2d]'",
    "envs.mujoco": "'gymnasium[mujoco]'",
    "envs.toy_text": "'gymnasium[toy-text]'",
    "ale_py": "ale-py opencv-python",
}


def make_registered(name: str, *, atari: bool = False, **settings: Any) -> gym.Env:
    """gymnasium.make with these settings. atari: require that the id is an ALE game."""
    if atari or name.startswith("ALE/"):
        _register_games()
    try:
        place = str(gym.spec(name).entry_point)
    except gym.error.Error as error:
        near = difflib.get_close_matches(name, gym.registry, n=1, cutoff=0.0)[0]
        raise InputError(f"env {name!r} is not known to Gymnasium. Did you mean {near!r}?") from error
    except ImportError as error:
        raise InputError(f"env {name!r} names a module that cannot be imported: {error}") from error
    if atari and not place.startswith("ale_py"):
        raise InputError(f"atari = true prepares ALE games, such as ALE/Pong-v5, but env is {name}: set it to false.")
    try:
        return gym.make(name, disable_env_checker=True, **settings)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        package = next((package for part, package in _PACKAGES.items() if part in place), None)
        remedy = f"pip install {package}" if package else "install it"
        raise InputError(f"env {name} needs a package that is missing: {remedy} ({error})") from error
    except gym.error.Error as error:
        raise InputError(f"env {name} cannot be made: {error}") from error


def _register_games() -> None:
    try:
        gym.register_envs(importlib.import_module("ale_py"))
    except ImportError as error:
        raise InputError(f"Atari games need packages that are missing: pip install {_PACKAGES['ale_py']}") from error


def make_by(factory: EnvFactory) -> gym.Env:
    """Make the environment by the user's function."""
    if isinstance(factory, gym.Env | VectorEnv):
        raise InputError(
            f"env is an environment ({factory}), but each row needs one of its own: give a function that makes one, such "
            "as lambda: MyEnv()."
        )
    if not callable(factory):
        raise InputError(f"env must be a Gymnasium id or a function that makes an environment, got {factory!r}.")
    try:
        made = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"env, the function that makes an environment, failed: {type(error).__name__}: {error}"
        ) from error
    if isinstance(made, VectorEnv) or not isinstance(made, gym.Env):
        raise InputError(
            f"env must be a Gymnasium id or a function that returns one gymnasium.Env, but it gave {made!r}."
        )
    return made


def flatten(env: gym.Env) -> gym.Env:
    """Wrap the environment so that its observations are one vector."""
    if not env.observation_space.is_np_flattenable:
        raise InputError(f"flatten = true is not possible for {env.observation_space}, whose size is not fixed.")
    return FlattenObservation(env)
