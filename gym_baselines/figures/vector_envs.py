"""Figure that compares one environment with several side by side, at equal steps: rollout size, time and return."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gym_baselines.figures.curves import evaluation_points
from gym_baselines.figures.settings import TrainedFigureConfig
from gym_baselines.figures.style import COLOURS, at_grid, band, common_grid, new_figure, seeds_text, steps_text, tidy
from gym_baselines.measuring.jobs import Job
from rlhf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Config(TrainedFigureConfig):
    """PPO on CartPole with 1 and 4 environments, everything else equal."""

    env: str = "CartPole-v1"
    """Gymnasium id; its PPO preset is used, with the changes of this figure."""
    num_envs: tuple[int, ...] = (1, 4)
    """Numbers of environments to compare."""
    rollout_steps: int = 128
    """Steps of each environment between two updates."""
    minibatch_size: int = 64
    """Transitions of each gradient step. The same for all, so that equal steps mean equally many gradient steps."""
    num_epochs: int = 10
    """Epochs over each rollout."""
    learning_rate: float = 3e-4
    """Learning rate of Adam at the start; it falls linearly to 0 over the run."""
    total_steps: int = 50_000
    """Environment steps of every run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_envs or any(count < 1 for count in self.num_envs):
            raise InputError(f"num_envs must be 1 or more each, got {list(self.num_envs)}.")


def jobs(config: Config) -> list[Job]:
    changes = {
        "rollout_steps": config.rollout_steps,
        "minibatch_size": config.minibatch_size,
        "num_epochs": config.num_epochs,
        "learning_rate": config.learning_rate,
        "gae_lambda": 0.95,
        "gamma": 0.99,
        "anneal_clip": False,
    }
    return [
        Job(
            f"{count}envs-seed{seed}",
            config.spec(config.env, "ppo", seed, changes=changes | {"num_envs": count}, measure_kl=False),
        )
        for seed in range(config.seeds)
        for count in sorted(config.num_envs)
    ]


def numbers(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Per number of environments: rollout size, seconds of each seed, final returns, learning curves."""
    rows = []
    for count in sorted(config.num_envs):
        runs = [results[f"{count}envs-seed{seed}"] for seed in range(config.seeds)]
        rows.append(
            {
                "num_envs": count,
                "rollout_size": count * config.rollout_steps,
                "wall_s": [run["wall_s"] for run in runs],
                "cpu_s": [run["cpu_s"] for run in runs],
                "final_return": [run["evaluations"][-1]["mean"] for run in runs],
                "curves": [evaluation_points(run) for run in runs],
            }
        )
    return {
        "env": config.env,
        "seeds": config.seeds,
        "total_steps": config.total_steps,
        "eval_every": config.eval_every,
        "eval_episodes": config.eval_episodes,
        "rollout_steps": config.rollout_steps,
        "rows": rows,
    }


def draw(numbers: Mapping[str, Any]) -> Any:
    figure = new_figure(12.5, 4.2)
    sizes, times, returns = figure.subplots(1, 3)
    rows = numbers["rows"]
    places = np.arange(len(rows))
    labels = [_envs(row["num_envs"]) for row in rows]
    sizes.bar(places, [row["rollout_size"] for row in rows], color=COLOURS[: len(rows)], width=0.55)
    for place, row in zip(places, rows, strict=True):
        sizes.annotate(f"{row['rollout_size']}", (place, row["rollout_size"]), ha="center", va="bottom")
    for shift, name, label, alpha in ((-0.18, "wall_s", "wall", 1.0), (0.18, "cpu_s", "CPU", 0.45)):
        medians = [np.median(row[name]) for row in rows]
        times.bar(places + shift, medians, color=COLOURS[: len(rows)], alpha=alpha, width=0.34)
        for place, row, middle in zip(places + shift, rows, medians, strict=True):
            times.plot([place, place], [min(row[name]), max(row[name])], color="black", linewidth=1)
            times.annotate(
                f"{label}\n{middle:.1f} s", (place, max(row[name])), ha="center", va="bottom", fontsize="small"
            )
    times.margins(y=0.2)
    for row, colour in zip(rows, COLOURS, strict=False):
        grid = common_grid(row["curves"], numbers["eval_every"])
        by_seed = np.array([at_grid(curve, grid) for curve in row["curves"]])
        band(returns, grid / 1000, by_seed, colour=colour, label=_envs(row["num_envs"]))
    for axes in (sizes, times):
        axes.set_xticks(places, labels)
    steps = steps_text(numbers["total_steps"])
    tidy(
        sizes,
        title=f"transitions per rollout\n({numbers['rollout_steps']} steps of each environment)",
        x="",
        y="transitions",
    )
    tidy(times, title=f"time of {steps} steps\n(bar: median, line: min..max over seeds)", x="", y="seconds of training")
    tidy(
        returns,
        title="return at equal steps",
        x="environment steps, thousands",
        y=f"mean return of {numbers['eval_episodes']} greedy episodes",
    )
    returns.legend(fontsize="small", frameon=False)
    figure.suptitle(f"PPO on {numbers['env']}, {seeds_text(numbers['seeds'])}", fontsize="large")
    return figure


def _envs(count: int) -> str:
    return f"{count} environment{'s' if count > 1 else ''}"


def verdict(numbers: Mapping[str, Any]) -> str:
    lines = [
        f"{_envs(row['num_envs'])}: rollouts of {row['rollout_size']}, {np.median(row['wall_s']):.1f} s wall and "
        f"{np.median(row['cpu_s']):.1f} s CPU for {steps_text(numbers['total_steps'])} steps, median final return "
        f"{np.median(row['final_return']):.0f}."
        for row in numbers["rows"]
    ]
    first, last = numbers["rows"][0], numbers["rows"][-1]
    ratio = float(np.median(first["wall_s"]) / np.median(last["wall_s"]))
    lines.append(
        f"{_envs(last['num_envs'])} instead of {first['num_envs']} makes the same steps {ratio:.2f} times as fast: one "
        "forward serves all of them. They share every rollout, so there are fewer but larger batches."
    )
    return "\n".join(lines)
