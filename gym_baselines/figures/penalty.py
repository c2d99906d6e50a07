"""Figure of PPO-Penalty: its adaptive coefficient, the KL against the target, and returns compared with PPO-Clip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gym_baselines.figures.curves import evaluation_points
from gym_baselines.figures.settings import TrainedFigureConfig
from gym_baselines.figures.style import COLOURS, at_grid, band, common_grid, new_figure, seeds_text, steps_text, tidy
from gym_baselines.measuring.jobs import Job
from rlhf.errors import InputError

NAMES = {"ppo_penalty": "PPO-Penalty", "ppo": "PPO-Clip"}
SETTLED = 0.2
"""The share of training after which the KL is compared with the target."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainedFigureConfig):
    """PPO-Penalty on CartPole: coefficient, measured KL against the target, and returns compared with PPO-Clip."""

    env: str = "CartPole-v1"
    """Gymnasium id; both algorithms use their presets."""
    penalty_target: float = 0.01
    """KL(old || policy) per update, in nats, that the coefficient is adapted to reach."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty_target <= 0:
            raise InputError(f"penalty_target must be above 0, got {self.penalty_target}.")


def jobs(config: Config) -> list[Job]:
    penalty = {
        "changes": {"penalty_target": config.penalty_target},
        "series": ("environment_steps", "penalty_coef", "measured_kl"),
    }
    return [
        Job(
            f"{name}-seed{seed}",
            config.spec(config.env, name, seed, measure_kl=False, **(penalty if name == "ppo_penalty" else {})),
        )
        for seed in range(config.seeds)
        for name in NAMES
    ]


def numbers(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Coefficient and KL of every rollout, per seed; evaluation curves of both algorithms."""
    rollouts = [results[f"ppo_penalty-seed{seed}"]["series"] for seed in range(config.seeds)]
    return {
        "env": config.env,
        "seeds": config.seeds,
        "total_steps": config.total_steps,
        "eval_every": config.eval_every,
        "eval_episodes": config.eval_episodes,
        "target": config.penalty_target,
        "rollouts": rollouts,
        "settled_kl": [_settled(series, config.total_steps) for series in rollouts],
        "curves": {
            name: [evaluation_points(results[f"{name}-seed{seed}"]) for seed in range(config.seeds)] for name in NAMES
        },
    }


def _settled(series: Mapping[str, Sequence[float | None]], total_steps: int) -> float | None:
    """Median KL per rollout after the first fifth of training."""
    pairs = zip(series["environment_steps"], series["measured_kl"], strict=True)
    kls = [kl for steps, kl in pairs if kl is not None and steps is not None and steps > SETTLED * total_steps]
    return float(np.median(kls)) if kls else None


def draw(numbers: Mapping[str, Any]) -> Any:
    figure = new_figure(12.5, 4.2)
    coefficient, kl, returns = figure.subplots(1, 3)
    target = numbers["target"]
    kl.axhspan(
        target / 1.5, 1.5 * target, color="grey", alpha=0.2, linewidth=0, label="band: target / 1.5 .. 1.5 target"
    )
    kl.axhline(target, color="grey", linestyle="--", linewidth=1, label=f"target {target:g}")
    for seed, (series, colour) in enumerate(zip(numbers["rollouts"], COLOURS * 2, strict=False)):
        steps = np.array(series["environment_steps"], dtype=float) / 1000
        coefficient.step(
            steps, np.array(series["penalty_coef"], dtype=float), color=colour, linewidth=1.1, label=f"seed {seed}"
        )
        measured = np.array(series["measured_kl"], dtype=float)
        kl.scatter(steps, measured, color=colour, s=5, alpha=0.35, linewidths=0)
        kl.plot(steps, _running_median(measured), color=colour, linewidth=1.4)
    coefficient.set_yscale("log", base=2)
    coefficient.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    kl.set_yscale("log")
    for (name, curves), colour in zip(numbers["curves"].items(), ("black", COLOURS[4]), strict=True):
        grid = common_grid(curves, numbers["eval_every"])
        band(
            returns, grid / 1000, np.array([at_grid(curve, grid) for curve in curves]), colour=colour, label=NAMES[name]
        )
    x = "environment steps, thousands"
    tidy(coefficient, title="coefficient of the penalty, used in each update", x=x, y="beta (log scale)")
    tidy(
        kl,
        title="KL of each update\n(line: running median of 15)",
        x=x,
        y="KL(old || policy) after the update, nats (log)",
    )
    tidy(
        returns,
        title=f"return beside PPO-Clip\n{seeds_text(numbers['seeds'])}",
        x=x,
        y=f"mean return of {numbers['eval_episodes']} greedy episodes",
    )
    for axes in (coefficient, kl, returns):
        axes.legend(fontsize="small", frameon=False)
    figure.suptitle(f"PPO-Penalty on {numbers['env']}", fontsize="large")
    return figure


def _running_median(values: np.ndarray, width: int = 15) -> np.ndarray:
    return np.array([np.nanmedian(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))])


def verdict(numbers: Mapping[str, Any]) -> str:
    target = numbers["target"]
    settled = [kl for kl in numbers["settled_kl"] if kl is not None]
    if not settled:
        return "The runs are too short to judge the KL."
    inside = sum(target / 1.5 <= kl <= 1.5 * target for kl in settled)
    ends = {name: np.median([curve[-1][1] for curve in curves]) for name, curves in numbers["curves"].items()}
    return (
        f"After the first fifth of training the median KL per rollout is {', '.join(f'{kl:.3g}' for kl in settled)} nats "
        f"(seed by seed): within a factor 1.5 of the target {target:g} in {inside} of {len(settled)} seeds. Median final "
        f"return after {steps_text(numbers['total_steps'])} steps: PPO-Penalty {ends['ppo_penalty']:.0f}, PPO-Clip "
        f"{ends['ppo']:.0f}."
    )
