"""Figure of the effect of GAE's lambda, from one step (0) to the whole return (1), on episodes of hundreds of steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gym_baselines.figures.settings import TrainedFigureConfig
from gym_baselines.figures.style import COLOURS, at_grid, common_grid, new_figure, seeds_text, steps_text, tidy
from gym_baselines.measuring.jobs import Job
from rlhf.errors import InputError

JUDGED = 0.95
"""The value of lambda that the verdict is about."""
STUDENT = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31, 6: 2.23, 7: 2.18, 8: 2.14, 9: 2.12}
"""Seeds n -> standard errors within which two equal means differ in 19 of 20 cases (Student's t, 2 n - 2 degrees)."""
CURVE_POINTS = 40
KEEP = {"series": ("environment_steps", "episode_return"), "measure_kl": False}


@dataclass(frozen=True, kw_only=True)
class Config(TrainedFigureConfig):
    """PPO on LunarLander with several lambdas: the last 20 episodes of training."""

    env: str = "LunarLander-v3"
    """Gymnasium id."""
    lambdas: tuple[float, ...] = (0.0, 0.5, 0.9, 0.95, 1.0)
    """Values of gae_lambda."""
    total_steps: int = 200_000
    """Environment steps of every run."""
    eval_every: int = 200_000
    """Environment steps between two evaluations. This figure does not use them: it shows training episodes."""
    num_envs: int = 8
    """Environments played side by side."""
    rollout_steps: int = 256
    """Steps of each environment between two updates. Small, so that 200k steps are about a hundred updates (with the
    preset, which is made for a million steps, they would be 12)."""
    minibatch_size: int = 128
    """Transitions of each gradient step."""
    num_epochs: int = 6
    """Epochs over each rollout."""
    learning_rate: float = 1e-3
    """Learning rate of Adam at the start; it falls linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambdas or any(not 0 <= value <= 1 for value in self.lambdas):
            raise InputError(f"lambdas must lie between 0 and 1, got {list(self.lambdas)}.")


def jobs(config: Config) -> list[Job]:
    changes = {
        "num_envs": config.num_envs,
        "rollout_steps": config.rollout_steps,
        "minibatch_size": config.minibatch_size,
        "num_epochs": config.num_epochs,
        "learning_rate": config.learning_rate,
        "lr_schedule": "linear",
        "gamma": config.gamma,
    }
    return [
        Job(
            f"lambda{value:g}-seed{seed}",
            config.spec(config.env, "ppo", seed, changes=changes | {"gae_lambda": value}, **KEEP),
        )
        for seed in range(config.seeds)
        for value in sorted(config.lambdas)
    ]


def numbers(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Per lambda: each seed's last training returns, their mean and standard deviation, and learning curves."""
    rows: list[dict[str, Any]] = []
    for value in sorted(config.lambdas):
        runs = [results[f"lambda{value:g}-seed{seed}"] for seed in range(config.seeds)]
        last = [run["last_returns"] for run in runs]
        together = np.concatenate(last)
        rows.append(
            {
                "lambda": value,
                "last_returns": last,
                "mean": float(together.mean()),
                "std": float(together.std()),
                "mean_by_seed": [float(np.mean(returns)) for returns in last],
                "curves": [_training_curve(run) for run in runs],
            }
        )
    return {
        "env": config.env,
        "seeds": config.seeds,
        "total_steps": config.total_steps,
        "episodes": min(len(returns) for row in rows for returns in row["last_returns"]),
        "rows": rows,
    }


def _training_curve(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(steps, mean return of the last 100 episodes) after each update."""
    pairs = zip(run["series"]["environment_steps"], run["series"]["episode_return"], strict=True)
    return [(steps, value) for steps, value in pairs if value is not None]


def draw(numbers: Mapping[str, Any]) -> Any:
    figure = new_figure(10.5, 4.4)
    bars, curves = figure.subplots(1, 2)
    rows = numbers["rows"]
    labels = [f"{row['lambda']:g}" for row in rows]
    for place, (row, colour) in enumerate(zip(rows, COLOURS * 2, strict=False)):
        bars.errorbar(place, row["mean"], row["std"], color=colour, marker="s", markersize=7, capsize=5, linewidth=1.6)
        offsets = np.linspace(-0.12, 0.12, len(row["mean_by_seed"])) if len(row["mean_by_seed"]) > 1 else np.zeros(1)
        bars.scatter(place + 0.25 + offsets, row["mean_by_seed"], s=14, facecolors="none", edgecolors=colour)
        grid = common_grid(row["curves"], numbers["total_steps"] / CURVE_POINTS)
        by_seed = np.array([at_grid(curve, grid) for curve in row["curves"]])
        curves.plot(
            grid / 1000, np.nanmedian(by_seed, 0), color=colour, linewidth=1.8, label=f"lambda {row['lambda']:g}"
        )
    bars.set_xticks(range(len(labels)), labels)
    bars.set_xlim(-0.5, len(labels) - 0.3)
    tidy(
        bars,
        title=f"last {numbers['episodes']} training episodes: mean and deviation\n(small circles: each seed's mean)",
        x="GAE lambda (0: one step, 1: whole return)",
        y="episode return",
    )
    tidy(
        curves,
        title="learning: median over seeds",
        x="environment steps, thousands",
        y="mean return of the last 100 training episodes",
    )
    curves.legend(fontsize="small", frameon=False)
    steps = steps_text(numbers["total_steps"])
    figure.suptitle(f"{numbers['env']}, PPO, {steps} steps, {_seeds(numbers)}", fontsize="large")
    return figure


def _seeds(numbers: Mapping[str, Any]) -> str:
    return seeds_text(numbers["seeds"]).split(":")[0]


def verdict(numbers: Mapping[str, Any]) -> str:
    """Says whether .95 is the best, not significantly worse than the best, or beaten."""
    lines = [f"lambda {row['lambda']:<5g} {row['mean']:7.1f} +- {row['std']:.1f}" for row in numbers["rows"]]
    judged = next((row for row in numbers["rows"] if row["lambda"] == JUDGED), None)
    if judged is None:
        return "\n".join(lines)
    best = max(numbers["rows"], key=lambda row: row["mean"])
    if best is judged:
        word = "the best of these"
    else:
        error = _standard_error(best, judged)
        gap = best["mean"] - judged["mean"]
        compared = f"{best['lambda']:g}, which is {gap:.1f} higher"
        if error is None:
            word = f"behind {compared}; one seed cannot tell whether by chance"
        elif gap <= STUDENT.get(numbers["seeds"], 2.1) * error:
            word = f"not to be told apart from {compared} with a standard error of {error:.1f} over seeds"
        else:
            word = f"beaten by {compared}, {gap / error:.1f} standard errors over seeds"
    return "\n".join([*lines, f"Verdict: at {steps_text(numbers['total_steps'])} steps, .95 is {word}."])


def _standard_error(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    """Standard error of the difference of two means over seeds; None with one seed."""
    if len(a["mean_by_seed"]) < 2:
        return None
    return float(np.sqrt(sum(np.var(row["mean_by_seed"], ddof=1) / len(row["mean_by_seed"]) for row in (a, b))))
