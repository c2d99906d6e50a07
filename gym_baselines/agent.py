"""A trained policy that predicts actions and can be saved (weights as safetensors, the rest as JSON) and loaded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from safetensors import SafetensorError
from safetensors.torch import load, save

from gym_baselines.envs.environments import EnvironmentConfig
from gym_baselines.envs.spaces import space_from_json, space_to_json
from gym_baselines.networks import ActorCritic, Features, NetworkConfig
from rlhf.core.random import EVALUATION, uniform
from rlhf.errors import InputError
from rlhf.runs.files import disk_errors, write_whole

AGENT_FILE, WEIGHTS_FILE, EVALUATION_FILE = "agent.json", "policy.safetensors", "evaluation.json"
_FORMAT = "gym_baselines agent 2"
_NOT_OF_THE_AGENT = ("output_dir", "overwrite", "resume", "progress_bar", "tensorboard")


@dataclass
class Agent:
    """A policy, with all that is needed to rebuild and use it."""

    policy: ActorCritic
    env: str
    """Gymnasium id of the environment, or just a label if `make_env` makes the environment."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The TrainConfig of its training, as plain values; `environment_config` reads the environment's part."""
    environment_steps: int = 0
    recent_returns: list[float] = field(default_factory=list)
    """Returns of the last training episodes."""
    make_env: Callable[[], gym.Env] | None = None
    """The user's function that makes one environment; not saved."""
    _calls: int = field(default=0, repr=False, compare=False)

    @torch.inference_mode()
    def predict(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        action_mask: Any = None,
        seed: int = 0,
        step: int | None = None,
    ) -> Any:
        """Actions as the environment takes them, for one observation or a batch.

        Args:
            observation: One observation, (*shape), or a batch, (rows, *shape).
            deterministic: Take the most likely action. Otherwise draw it, as a pure function of (seed, step, row).
            action_mask: True for each allowed choice, (choices,) or (rows, choices).
            seed: Seed of drawn actions.
            step: Step of drawn actions. If None, a counter of the agent, so that every call draws anew.

        Returns:
            One action for one observation, else one per row.
        """
        rows, single = self._rows(observation)
        mask = None if action_mask is None else self._mask(action_mask, len(rows), single)
        device = self.policy.device
        if deterministic:
            chosen = self.policy.greedy(rows.to(device), mask)
        else:
            if step is None:
                step, self._calls = self._calls, self._calls + 1
            draws = uniform(
                seed, EVALUATION, step, torch.arange(len(rows))[:, None], torch.arange(self.policy.num_draws)
            )
            chosen, _ = self.policy.sample(rows.to(device), draws.to(device), mask)
        actions = self.policy.env_actions(chosen)
        return actions[0] if single else actions

    def environment_config(self) -> EnvironmentConfig:
        """How the environments were made in training."""
        return EnvironmentConfig(**self.settings.get("environment", {}))

    def save(self, directory: str | Path) -> None:
        """Write agent.json and policy.safetensors, each atomically: no partial file is ever left."""
        directory = Path(directory)
        policy = self.policy
        weights = save({name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()})
        facts = {
            "format": _FORMAT,
            "env": self.env,
            "observation_space": space_to_json(policy.observation_space),
            "action_space": space_to_json(policy.action_space),
            "network": asdict(policy.config),
            "has_own_features": policy.has_own_features,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "settings": self.settings,
            "environment_steps": self.environment_steps,
            "recent_returns": self.recent_returns,
        }
        remedy = "Free disk space, fix the path or name another folder; a run exports its agent when it is resumed."
        with disk_errors(f"The agent cannot be saved in {directory}", remedy, kind=InputError):
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / WEIGHTS_FILE, weights)
            write_whole(directory / AGENT_FILE, json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n")

    @classmethod
    def load(cls, directory: str | Path, *, features: Features | None = None) -> "Agent":
        """Load an agent that `save` wrote. Raises InputError if its files are missing, damaged or something else.

        features: the function that makes the feature module, needed for an agent that was trained with one.
        """
        directory = Path(directory)
        problem = f"{directory} does not hold an agent saved by gym_baselines"
        try:
            facts = json.loads((directory / AGENT_FILE).read_bytes())
            if not isinstance(facts, dict) or not str(facts.get("format")).startswith("gym_baselines agent"):
                raise ValueError(f"{AGENT_FILE} is something else")
            if facts["format"] != _FORMAT:
                raise InputError(
                    f"{directory} holds an agent of the format {facts['format']!r}; this version reads {_FORMAT!r}. Train "
                    "it again, or use the version that wrote it."
                )
            _check_features(facts["has_own_features"], features, directory)
            weights = (directory / WEIGHTS_FILE).read_bytes()
            if hashlib.sha256(weights).hexdigest() != facts["weights_sha256"]:
                raise ValueError(f"{WEIGHTS_FILE} is not what was written")
            policy = ActorCritic(
                space_from_json(facts["observation_space"]),
                space_from_json(facts["action_space"]),
                NetworkConfig(**_with_tuples(facts["network"])),
                features=features,
            )
            policy.to(getattr(torch, facts["dtype"])).load_state_dict(load(weights))
            agent = cls(
                policy=policy,
                env=facts["env"],
                settings=facts["settings"],
                environment_steps=facts["environment_steps"],
                recent_returns=facts["recent_returns"],
            )
            agent.environment_config()
            return agent
        except InputError:
            raise
        except OSError as error:
            raise InputError(
                f"{problem}: {error}. Give the output_dir of a finished training run; finish an "
                "interrupted one by the same command with --resume."
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{problem}, or its files are damaged ({error}). Train it again.") from error

    def _rows(self, observation: Any) -> tuple[torch.Tensor, bool]:
        """The observations as (rows, *shape), and whether a single one was given."""
        space = self.policy.observation_space
        observation = np.asarray(observation)
        shape = space.shape or ()
        single = observation.shape == shape
        if not single and (observation.ndim == 0 or observation.shape[1:] != shape):
            raise InputError(
                f"observation has the shape {observation.shape}, but the agent takes {shape}, or (rows, *{shape})."
            )
        if not (np.issubdtype(observation.dtype, np.number) or observation.dtype == np.bool_):
            raise InputError(f"observation has the type {observation.dtype}; numbers are needed.")
        if isinstance(space, Discrete):
            if not np.issubdtype(observation.dtype, np.integer) or not _all_within(observation, space):
                raise InputError(f"observation {observation!r:.200} does not lie in the agent's {space}.")
        elif isinstance(space, Box) and not np.isfinite(observation).all():
            raise InputError(
                f"observation holds a number that is not finite: {observation!r:.200}. Look for a division by zero or a "
                "diverging simulation in the environment."
            )
        rows = torch.as_tensor(np.ascontiguousarray(observation[None] if single else observation))
        return rows if rows.dtype != torch.float64 else rows.to(self.policy.dtype), single

    def _mask(self, action_mask: Any, num_rows: int, single: bool) -> torch.Tensor:
        mask = np.asarray(action_mask)
        mask = mask[None] if single else mask
        wanted = (num_rows, self.policy.family.num_params)
        if mask.shape != wanted:
            raise InputError(
                f"action_mask has the shape {mask.shape[single:]}, but {wanted[single:]} is needed: one entry for each "
                "choice, those of several choices one after the other."
            )
        allowed = torch.as_tensor(mask.astype(bool))
        if not allows_something(allowed, self.policy):
            raise InputError("action_mask allows no choice at all for some action: at least one must be true.")
        return allowed.to(self.policy.device)


def allows_something(action_mask: torch.Tensor, policy: ActorCritic) -> bool:
    """Whether each row of the mask, (rows, choices), allows a choice for each part of the action."""
    sizes = getattr(policy.family, "sizes", (action_mask.shape[-1],))
    return all(bool(part.any(-1).all()) for part in action_mask.split(sizes, -1))


def _all_within(observation: np.ndarray, space: Discrete) -> bool:
    return bool(((observation >= space.start) & (observation < space.start + space.n)).all())


def _check_features(needed: bool, features: Features | None, directory: Path) -> None:
    if needed and features is None:
        raise InputError(
            f"The agent in {directory} was trained with a feature module of its own, which is not saved: pass the function "
            "that makes it, load(directory, features=...)."
        )
    if features is not None and not needed:
        raise InputError(f"The agent in {directory} was trained without a feature module: load it without features.")


def _with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def describe(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, without the settings that only concern output (folder, resuming, progress bar)."""
    settings = asdict(config)
    return {name: settings[name] for name in settings if name not in _NOT_OF_THE_AGENT}
