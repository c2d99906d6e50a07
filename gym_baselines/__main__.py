"""The commands: `python -m gym_baselines train | evaluate | compare | plot ...`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from gym_baselines import compare, plots
from gym_baselines.agent import EVALUATION_FILE, Agent
from gym_baselines.config import TrainConfig
from gym_baselines.evaluate import evaluate
from gym_baselines.presets import is_tuned, preset
from gym_baselines.train import Training, make_group
from gym_baselines.video import record_video
from rlhf.commands.cli import guard, parse
from rlhf.errors import InputError

USAGE = """usage: python -m gym_baselines COMMAND ...

  train      train an agent: --env CartPole-v1 --algorithm ppo --seed 0, --config FILE.yaml, any setting (--help)
  evaluate   play episodes with a saved agent: evaluate DIR [--episodes 100] [--seed 0] [--video VIDEO_DIR]
  compare    several algorithms over several seeds: learning curves and a table (compare --help)
  plot       one of the figures of the documentation, with its data (plot --help)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. A user's error is reported as one line on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train_command, "evaluate": evaluate_command, "compare": compare.main, "plot": plots.main}
    if not arguments or arguments[0] not in commands:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    torch.set_num_threads(1)  # the networks are so small that more threads are slower
    with guard():
        commands[arguments[0]](arguments[1:])


def train_command(argv: Sequence[str]) -> None:
    """Train, save, and evaluate the agent over config.final_episodes episodes, with greedy and with sampled actions."""
    config = parse_config(argv)
    distributed = make_group(config)
    training = Training(config, distributed=distributed)
    if distributed.is_main:
        print(summary(config, distributed.world_size))
    try:
        training.train()
    finally:
        training.close()
    agent = training.agent
    if distributed.is_main:
        results = report(agent, episodes=config.final_episodes, seed=config.seed)
        (Path(str(config.output_dir)) / EVALUATION_FILE).write_text(json.dumps(results, sort_keys=True) + "\n")
        print(f"agent and metrics are in {config.output_dir}: python -m gym_baselines evaluate {config.output_dir}")


def evaluate_command(argv: Sequence[str]) -> None:
    """Play episodes with a saved agent."""
    parser = argparse.ArgumentParser(prog="python -m gym_baselines evaluate")
    parser.add_argument("directory", help="output_dir of a training run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="decides the start states and the sampled actions")
    parser.add_argument("--video", metavar="DIR", help="also record one greedy episode there, as MP4")
    options = parser.parse_args(argv)
    agent = Agent.load(options.directory)
    report(agent, episodes=options.episodes, seed=options.seed)
    if options.video is not None:
        print(f"video: {record_video(agent, options.video, seed=options.seed)}")


def report(agent: Agent, *, episodes: int, seed: int) -> dict[str, Any]:
    """Evaluate the agent with greedy and with sampled actions; print and return the results."""
    results = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        evaluation = evaluate(agent, episodes=episodes, seed=seed, greedy=greedy)
        print(f"{agent.env} after {agent.environment_steps} steps, {name} actions: return {evaluation}")
        results[name] = {"mean": evaluation.mean, "std": evaluation.std, "episodes": episodes}
    return results


def summary(config: TrainConfig, num_processes: int) -> str:
    """Lines that summarise the settings: numbers of updates, transitions and optimizer steps."""
    update = config.update
    size = min(update.minibatch_size or config.batch_size, config.batch_size)
    minibatches = -(-config.batch_size // size)
    origin = "tuned" if is_tuned(config.env, config.algorithm) else "general"
    updates = -(-config.total_steps // config.batch_size)
    first = "a trust-region step, then " if config.trust_region is not None else ""
    return (
        f"{config.algorithm} on {config.env}, {origin} settings, seed {config.seed}, {_count(num_processes, 'process')}\n"
        f"about {_count(updates, 'update')} of {_count(config.num_envs, 'environment')} x "
        f"{_count(config.rollout_steps, 'step')} = {config.batch_size} transitions; in each, {first}"
        f"{_count(update.num_epochs, 'epoch')} x {_count(minibatches, 'minibatch')} of {size} = "
        f"{_count(update.num_epochs * minibatches, 'optimizer step')}"
    )


def _count(number: int, what: str) -> str:
    plural = {"process": "processes", "minibatch": "minibatches"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Settings: the preset of environment and algorithm, then `--config FILE.yaml`, then the command line."""
    env, algorithm = _named(argv, "env") or TrainConfig.env, _named(argv, "algorithm") or TrainConfig.algorithm
    folder = f"runs/{env.replace('/', '-')}-{algorithm}-seed{_named(argv, 'seed') or TrainConfig.seed}"
    tuned = preset(env, algorithm, output_dir=folder)
    return parse(TrainConfig, argv, description="Train on a Gymnasium environment.", defaults=asdict(tuned))


def _named(argv: Sequence[str], setting: str) -> str | None:
    """The value of one setting in the command line or config file, needed to find the preset before parsing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{setting}")
    parser.add_argument("--config")
    try:
        options, _ = parser.parse_known_args([argument for argument in argv if argument != "--help"])
    except argparse.ArgumentError as error:
        raise InputError(f"{error}. Give the value after it.") from error
    settings = {}
    if options.config is not None:
        try:
            settings = yaml.safe_load(Path(options.config).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"--config {options.config} cannot be read as YAML: {' '.join(str(error).split())}"
            ) from error
    named = settings.get(setting) if isinstance(settings, dict) else None
    return getattr(options, setting) or (str(named) if isinstance(named, str | int) else None)


if __name__ == "__main__":
    main()
