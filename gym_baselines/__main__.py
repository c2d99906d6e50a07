"""The commands: `python -m gym_baselines train --env CartPole-v1 --seed 0` and `python -m gym_baselines evaluate DIR`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from gym_baselines.agent import Agent
from gym_baselines.config import PRESETS, TrainConfig, preset
from gym_baselines.evaluate import evaluate
from gym_baselines.train import train
from rlhf.cli import guard, parse
from rlhf.distributed import Distributed
from rlhf.errors import InputError

EVALUATION_FILE = "evaluation.json"
USAGE = """usage: python -m gym_baselines COMMAND ...

  train      train PPO: --env CartPole-v1 --seed 0, --config FILE.yaml, any setting (--help lists them)
  evaluate   play episodes with a saved agent: evaluate DIR [--episodes 100] [--seed 0]"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error of the user's is one line on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train_command, "evaluate": evaluate_command}
    if not arguments or arguments[0] not in commands:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    torch.set_num_threads(1)  # the networks are too small to share out: more threads are slower
    with guard():
        commands[arguments[0]](arguments[1:])


def train_command(argv: Sequence[str]) -> None:
    """Train, save, and evaluate the result over 100 episodes, greedily and as it was trained."""
    config = parse_config(argv)
    distributed = Distributed()
    if distributed.is_main:
        print(summary(config, distributed.world_size))
    agent = train(config, distributed=distributed)
    if distributed.is_main:
        results = report(agent, episodes=100, seed=config.seed)
        (Path(str(config.output_dir)) / EVALUATION_FILE).write_text(json.dumps(results, sort_keys=True) + "\n")
        print(f"agent and metrics are in {config.output_dir}: python -m gym_baselines evaluate {config.output_dir}")
    distributed.close()


def evaluate_command(argv: Sequence[str]) -> None:
    """Play episodes with a saved agent."""
    parser = argparse.ArgumentParser(prog="python -m gym_baselines evaluate")
    parser.add_argument("directory", help="output_dir of a training run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="decides the start states and the sampled actions")
    options = parser.parse_args(argv)
    report(Agent.load(options.directory), episodes=options.episodes, seed=options.seed)


def report(agent: Agent, *, episodes: int, seed: int) -> dict[str, Any]:
    """Print what the greedy and the sampling policy reach; the numbers."""
    results = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        evaluation = evaluate(agent.policy, agent.env, episodes=episodes, seed=seed, greedy=greedy)
        print(f"{agent.env} after {agent.environment_steps} steps, {name} actions: return {evaluation}")
        results[name] = {"mean": evaluation.mean, "std": evaluation.std, "episodes": episodes}
    return results


def summary(config: TrainConfig, num_processes: int) -> str:
    """What the settings amount to."""
    minibatches = config.batch_size // config.update.minibatch_size
    updates = -(-config.total_steps // config.batch_size)
    origin = "tuned" if config.env in PRESETS else "general"
    return (
        f"PPO on {config.env}, seed {config.seed}, {num_processes} process{'es' if num_processes > 1 else ''}: "
        f"{config.num_envs} environments x {config.rollout_steps} steps = {config.batch_size} transitions per rollout; "
        f"{config.update.num_epochs} epochs x {minibatches} minibatches of {config.update.minibatch_size} = "
        f"{config.update.num_epochs * minibatches} optimizer steps; "
        f"about {updates} updates ({origin} settings)"
    )


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Settings: the environment's preset, then `--config FILE.yaml`, then the command line."""
    tuned = dict(_flat(asdict(preset(_named_env(argv)))))
    config = parse(TrainConfig, argv, description="Train PPO on a Gymnasium environment.", defaults=tuned)
    folder = config.output_dir or f"runs/{config.env.replace('/', '-')}-seed{config.seed}"
    return replace(config, output_dir=folder)


def _named_env(argv: Sequence[str]) -> str:
    """The environment that the arguments name, whose preset is looked up before they are read in full."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--env")
    parser.add_argument("--config")
    options, _ = parser.parse_known_args([argument for argument in argv if argument != "--help"])
    settings = {}
    if options.config is not None:
        try:
            settings = yaml.safe_load(Path(options.config).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"--config {options.config} cannot be read as YAML: {' '.join(str(error).split())}"
            ) from error
    named = settings.get("env") if isinstance(settings, dict) else None
    return options.env or (named if isinstance(named, str) else TrainConfig.env)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings under dotted names, as jsonargparse wants its defaults."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


if __name__ == "__main__":
    main()
