"""`python -m gym_baselines compare`: several algorithms over several seeds, one process each; curves and tables.

python -m gym_baselines compare --env CartPole-v1 --algorithms ppo,a2c,trpo --seeds 5
python -m gym_baselines compare --env Pendulum-v1 --algorithms ppo,sb3_sac --seeds 3 --workers 2
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym

from gym_baselines.envs.environments import make_env
from gym_baselines.figures.curves import draw_curves
from gym_baselines.figures.style import save
from gym_baselines.figures.tables import (
    Summary,
    count_lines,
    markdown,
    measured_table,
    plain,
    quoted_table,
    summarize,
)
from gym_baselines.measuring.jobs import Job, run_jobs
from gym_baselines.measuring.measure import PEER_PREFIX, preset_steps, write_json
from gym_baselines.measuring.meter import RunSpec
from gym_baselines.measuring.peers import ALGORITHMS as PEERS
from gym_baselines.measuring.peers import default_steps, measures_kl, require
from gym_baselines.measuring.zoo import ZOO
from gym_baselines.presets import is_tuned
from rlhf.commands.cli import parse
from rlhf.errors import InputError

OWN = ("reinforce", "a2c", "trpo", "ppo", "ppo_penalty")
THRESHOLDS = {"Pendulum-v1": -230.0}
"""Return thresholds of environments for which Gymnasium defines none."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare algorithms on one environment, each with its own preset."""

    env: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    algorithms: list[str] = field(default_factory=lambda: list(OWN))
    """Any of reinforce, a2c, trpo, ppo, ppo_penalty and, from Stable-Baselines3, sb3_dqn, sb3_sac, sb3_ppo, sb3_a2c,
    sb3_trpo. May be separated by commas: ppo,a2c."""
    seeds: int = 5
    """Runs of each algorithm, with seeds 0, 1, ..."""
    total_steps: int | None = None
    """Environment steps of every run; as in each algorithm's preset if null."""
    eval_every: int = 5_000
    """Environment steps between two evaluations."""
    eval_episodes: int = 20
    """Greedy episodes of each evaluation."""
    final_episodes: int = 100
    """Greedy episodes of the evaluation at the end."""
    threshold: float | None = None
    """Return that counts as solved; the environment's own if null."""
    output_dir: str | None = None
    """Folder of the results; runs/compare-ENV if null."""
    workers: int = 1
    """Runs at the same time, one thread each. CPU seconds are comparable only if as many cores are idle."""
    overwrite: bool = False
    """Measure again even if the folder already holds results."""

    def __post_init__(self) -> None:
        names = [name.strip() for text in self.algorithms for name in text.split(",") if name.strip()]
        object.__setattr__(self, "algorithms", list(dict.fromkeys(names)))
        known = (*OWN, *PEERS)
        for name in self.algorithms:
            if name not in known:
                raise InputError(f"algorithms: {name!r} is not known. Choose from {', '.join(known)}.")
        if not self.algorithms:
            raise InputError(f"algorithms is empty: choose from {', '.join(known)}.")
        for setting in ("seeds", "eval_every", "eval_episodes", "final_episodes", "workers"):
            if getattr(self, setting) < 1:
                raise InputError(f"{setting} must be at least 1, got {getattr(self, setting)}.")
        if self.total_steps is not None and self.total_steps < 1:
            raise InputError(f"total_steps must be at least 1, or null for the presets', got {self.total_steps}.")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"runs/compare-{self.env.replace('/', '-')}")


def main(argv: Sequence[str] | None = None) -> None:
    """Do the missing runs, write curves.png, table.md, table.txt and summary.json, and print the tables."""
    compare(parse(CompareConfig, argv, description="Compare algorithms over seeds, each run in its own process."))


def compare(config: CompareConfig) -> list[Summary]:
    """Measure, report, and return the summaries in the order of config.algorithms."""
    for algorithm in config.algorithms:
        if algorithm in PEERS:
            require(algorithm, config.env)
    threshold = threshold_of(config)
    jobs = jobs_of(config)
    results = run_jobs(jobs, config.folder, workers=config.workers, overwrite=config.overwrite, description=config.env)
    runs = {
        name: [results[job.name] for job in jobs if job.task == "run" and job.spec.algorithm == name]
        for name in config.algorithms
    }
    lines = {name: results[f"{name}-lines"]["lines"] for name in config.algorithms}
    counts = count_lines(lines, {name: library(name) for name in lines})
    summaries = [summarize(name, runs[name], threshold, counts[name]) for name in config.algorithms]
    report(config, runs, summaries, threshold)
    return summaries


def threshold_of(config: CompareConfig) -> float | None:
    if config.threshold is not None:
        return config.threshold
    make_env(config.env, seed=0, row=0).close()  # refuses an unknown id before the first process starts
    own = gym.spec(config.env).reward_threshold
    return THRESHOLDS.get(config.env) if own is None else float(own)


def jobs_of(config: CompareConfig) -> list[Job]:
    """Jobs that count lines, then the runs, seed by seed: so an interrupted comparison covers all algorithms."""
    lines = [
        Job(f"{name}-lines", RunSpec(env=config.env, algorithm=name, seed=0, total_steps=1, eval_every=1), task="lines")
        for name in config.algorithms
    ]
    steps = {name: config.total_steps or _preset_steps(config.env, name) for name in config.algorithms}
    runs = [
        Job(
            f"{name}-seed{seed}",
            RunSpec(
                env=config.env,
                algorithm=name,
                seed=seed,
                total_steps=steps[name],
                eval_every=config.eval_every,
                eval_episodes=config.eval_episodes,
                final_episodes=config.final_episodes,
                measure_kl=name not in PEERS or measures_kl(name),
            ),
        )
        for seed in range(config.seeds)
        for name in config.algorithms
    ]
    return [*lines, *runs]


def _preset_steps(env: str, algorithm: str) -> int:
    return default_steps(algorithm, env) if algorithm in PEERS else preset_steps(env, algorithm)


def _is_tuned(env: str, algorithm: str) -> bool:
    return (algorithm, env) in ZOO if algorithm in PEERS else is_tuned(env, algorithm)


def library(algorithm: str) -> str:
    return "Stable-Baselines3" if algorithm.startswith(PEER_PREFIX) else "gym_baselines"


def report(
    config: CompareConfig,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    summaries: Sequence[Summary],
    threshold: float | None,
) -> None:
    """Write the tables, the summary and the figure of the results; print the tables."""
    tables = [measured_table(summaries, threshold), quoted_table(summaries, threshold)]
    notes = footnotes(config, threshold)
    folder = config.folder
    (folder / "table.txt").write_text("\n\n".join([*map(plain, tables), notes]) + "\n")
    (folder / "table.md").write_text("\n\n".join([*map(markdown, tables), notes]) + "\n")
    write_json(folder / "summary.json", [as_json(one) for one in summaries])
    figure = draw_curves(
        runs, env=config.env, every=config.eval_every, threshold=threshold, episodes=config.eval_episodes
    )
    save(figure, folder / "curves.png")
    print(f"\n{(folder / 'table.txt').read_text()}\nwritten to {folder}: curves.png, table.md, table.txt, summary.json")


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as JSON values; infinity (threshold never reached) becomes null, since JSON has no infinity."""
    return {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in summary._asdict().items()
    }


def footnotes(config: CompareConfig, threshold: float | None) -> str:
    goal = "the threshold" if threshold is None else f"{threshold:g}"
    general = [name for name in config.algorithms if not _is_tuned(config.env, name)]
    untuned = f" (without one, at general settings: {', '.join(general)})" if general else ""
    lines = [
        f"{config.env}, seeds 0..{config.seeds - 1}, each algorithm at its own preset{untuned}; every number is a median "
        "over the seeds unless it says otherwise.",
        f"Final return: {config.final_episodes} greedy episodes after training. In the second table, best - final is how "
        "far the last evaluation lies below the best one.",
        f"Steps and CPU seconds to {goal}: at the first of the evaluations ({config.eval_episodes} greedy episodes every "
        f"{config.eval_every} steps) that reaches it; in brackets how many seeds did. A seed that never did counts as "
        "later than all others.",
        "CPU: this process's seconds, one thread, without evaluation. Peak memory: of the whole process, Python and torch "
        "included.",
        "KL per update: exact KL(old || new) in nats at 256 states that the policy visits, median over all updates and "
        "seeds; - where it is not measured (off-policy algorithms).",
        "Lines of code: lines of the library that two rollouts and updates really execute, without comments, docstrings "
        "and `def` lines. Own: those that not all algorithms of the same library in this table execute. Between "
        "libraries the numbers also differ by style.",
        "Complexity, sample efficiency, stability: the usual ratings, next to what was measured here.",
    ]
    return "\n".join(f"- {line}" for line in lines)
