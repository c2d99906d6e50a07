"""Measures one training run, in its own process: `python -m gym_baselines.measuring.measure TASK SPEC_JSON RESULT`.

TASK is run or lines.

`compare` and `plot` start one such process per run, so that CPU seconds and peak memory belong to that run alone. The
result is one JSON file.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gym_baselines.agent import Agent, describe
from gym_baselines.config import TrainConfig
from gym_baselines.evaluate import evaluate
from gym_baselines.measuring.lines_of_code import executed_lines
from gym_baselines.measuring.meter import Meter, RunSpec
from gym_baselines.presets import preset
from gym_baselines.train import train
from rlhf.commands.cli import guard
from rlhf.runs.files import write_whole

PEER_PREFIX = "sb3_"


class OwnPlayer:
    """An agent of this package as a `Player`."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.env = agent.env
        self.options = agent.environment_config()

    def evaluate(self, episodes: int, seed: int) -> np.ndarray:
        return evaluate(self.agent, episodes=episodes, seed=seed).returns

    def sample(self, observations: np.ndarray, step: int) -> np.ndarray:
        return self.agent.predict(observations, deterministic=False, step=step)

    @torch.inference_mode()
    def distribution(self, observations: np.ndarray) -> Any:
        policy = self.agent.policy
        states = torch.as_tensor(observations).to(policy.device)
        return policy({"observations": states}, policy.greedy(states).unsqueeze(1), with_values=False).distribution

    def kl(self, old: Any, new: Any) -> float:
        return float(self.agent.policy.family.kl(old, new).mean())


def preset_steps(env: str, algorithm: str) -> int:
    """Environment steps in the preset of an algorithm of this package."""
    spec = RunSpec(env=env, algorithm=algorithm, seed=0, total_steps=1, eval_every=1)
    return config_of(spec, keep_steps=True).total_steps


def config_of(spec: RunSpec, *, keep_steps: bool = False) -> TrainConfig:
    """The settings of a run of this package. keep_steps: keep the preset's total_steps."""
    changes = spec.changes | {"seed": spec.seed, "progress_bar": False}
    if not keep_steps:
        changes["total_steps"] = spec.total_steps
    return preset(spec.env, algorithm=spec.algorithm, **changes)


def key_of(spec: RunSpec) -> dict[str, Any]:
    """What must be equal for a stored result to be used again: the spec, and all settings that follow from it now."""
    if spec.algorithm.startswith(PEER_PREFIX):
        from gym_baselines.measuring.peers import settings_of

        settings = settings_of(spec)
    else:
        settings = describe(config_of(spec))
    return json.loads(json.dumps({"spec": asdict(spec), "settings": settings}))


def measured_run(spec: RunSpec) -> dict[str, Any]:
    """Train as `spec` says, and return the measurements as JSON values."""
    warm_up()
    if spec.algorithm.startswith(PEER_PREFIX):
        from gym_baselines.measuring.peers import measured_peer

        return measured_peer(spec, Meter(spec))
    config = config_of(spec)
    meter = Meter(spec)

    def watch(agent: Agent, metrics: dict[str, float]) -> None:
        meter.after_update(int(metrics["environment_steps"]), OwnPlayer(agent), metrics)

    agent = train(config, callbacks=[watch])
    return meter.result(OwnPlayer(agent), [float(value) for value in agent.recent_returns])


def warm_up() -> None:
    """Let torch load what its first gradient step needs (2 s), so that no algorithm is charged for it."""
    layer = torch.nn.Linear(1, 1)
    layer(torch.ones(1, 1)).sum().backward()
    torch.optim.Adam(layer.parameters()).step()


def measured_lines(spec: RunSpec) -> dict[str, Any]:
    """Lines of the library that a short training run executes: "lines" is file -> numbers. See lines_of_code.py."""
    warm_up()
    if spec.algorithm.startswith(PEER_PREFIX):
        from gym_baselines.measuring.peers import peer_lines

        lines = peer_lines(spec)
    else:
        config = config_of(replace(spec, total_steps=2 * config_of(spec).batch_size))
        lines = executed_lines(lambda: train(config), ["gym_baselines", "rlhf"])
    return {"lines": lines}


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically: no partial file is ever left."""
    write_whole(path, json.dumps(content, sort_keys=True, allow_nan=False).encode() + b"\n")


TASKS: dict[str, Callable[[RunSpec], Any]] = {"run": measured_run, "lines": measured_lines}


def main(task: str, spec: str, path: str) -> None:
    torch.set_num_threads(1)
    values = json.loads(spec)
    run = RunSpec(**values | {"series": tuple(values["series"])})
    with guard():
        write_json(Path(path), key_of(run) | TASKS[task](run))


if __name__ == "__main__":
    main(*sys.argv[1:])
