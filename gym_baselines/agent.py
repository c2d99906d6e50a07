"""A trained policy that can be asked for actions, saved and loaded: safetensors for the weights, JSON for the rest."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gym_baselines.networks import CategoricalPolicy
from rlhf.core.random import EVALUATION, uniform
from rlhf.errors import InputError

AGENT_FILE, WEIGHTS_FILE = "agent.json", "policy.safetensors"
_FORMAT = "gym_baselines agent 1"


@dataclass
class Agent:
    """A policy and what is needed to rebuild and use it."""

    policy: CategoricalPolicy
    env: str
    observation_shape: tuple[int, ...]
    num_actions: int
    first_action: int
    hidden_sizes: tuple[int, ...]
    settings: dict[str, Any]
    """The TrainConfig it was trained with, for the record."""
    environment_steps: int = 0

    @torch.inference_mode()
    def predict(
        self, observation: np.ndarray, *, deterministic: bool = True, seed: int = 0, step: int = 0
    ) -> np.ndarray:
        """Actions for one observation or a batch of them: the most likely, or drawn (by seed, step and place)."""
        observation = np.asarray(observation)
        single = observation.shape == self.observation_shape
        if observation.shape[int(not single) :] != self.observation_shape:
            raise InputError(
                f"observation has shape {observation.shape}, but the agent takes {self.observation_shape}."
            )
        device = next(self.policy.parameters()).device
        rows = torch.as_tensor(observation[None] if single else observation).to(device, self.policy.dtype)
        if deterministic:
            chosen = self.policy.greedy(rows)
        else:
            draws = uniform(seed, EVALUATION, step, torch.arange(len(rows), device=device))
            chosen, _ = self.policy.sample(rows, draws)
        actions = chosen.cpu().numpy() + self.first_action
        return actions[0] if single else actions

    def save(self, directory: str | Path) -> None:
        """Write agent.json and policy.safetensors; each file is whole or absent."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.policy.state_dict().items()}
        save_file(weights, directory / f"{WEIGHTS_FILE}.partial")
        os.replace(directory / f"{WEIGHTS_FILE}.partial", directory / WEIGHTS_FILE)
        facts = {name: value for name, value in vars(self).items() if name != "policy"}
        facts |= {"format": _FORMAT, "dtype": str(self.policy.dtype).removeprefix("torch.")}
        (directory / f"{AGENT_FILE}.partial").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        os.replace(directory / f"{AGENT_FILE}.partial", directory / AGENT_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> "Agent":
        """Read what `save` wrote. InputError if it is missing, damaged or something else."""
        directory = Path(directory)
        remedy = f"{directory} does not hold an agent saved by gym_baselines"
        try:
            facts = json.loads((directory / AGENT_FILE).read_text())
            if facts.pop("format") != _FORMAT:
                raise ValueError("another format")
            dtype = getattr(torch, facts.pop("dtype"))
            shape, hidden = tuple(facts.pop("observation_shape")), tuple(facts.pop("hidden_sizes"))
            policy = CategoricalPolicy(shape, facts["num_actions"], hidden_sizes=hidden).to(dtype)
            policy.load_state_dict(load_file(directory / WEIGHTS_FILE))
            return cls(policy=policy, observation_shape=shape, hidden_sizes=hidden, **facts)
        except OSError as error:
            raise InputError(f"{remedy}: {error}. Give the output_dir of a finished training run.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{remedy}, or its files are damaged ({error}). Train it again.") from error


def describe(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, without what only concerns where the run was written."""
    settings = asdict(config)
    return {name: settings[name] for name in settings if name not in ("output_dir", "overwrite", "progress_bar")}


def check_output_dir(directory: str | Path, *, overwrite: bool, files: Sequence[str]) -> None:
    """Before training starts: refuse a folder that holds another run, clear its files if that was asked for."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir {directory} is a file: name a folder.")
    present = [name for name in files if (directory / name).exists()]
    if present and not overwrite:
        raise InputError(
            f"output_dir {directory} already holds a run ({', '.join(present)}). Name another folder, or replace the run "
            "with overwrite=True (--overwrite true)."
        )
    for name in present:
        (directory / name).unlink()
