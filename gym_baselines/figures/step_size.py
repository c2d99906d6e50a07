"""Figure of what the clip prevents: the same surrogate with and without it, at growing learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gym_baselines.figures.settings import TrainedFigureConfig
from gym_baselines.figures.style import COLOURS, band, new_figure, seeds_text, steps_text, tidy
from gym_baselines.measuring.jobs import Job
from rlhf.errors import InputError

SURROGATES = ("clipped", "unclipped")
COLOUR = dict(zip(SURROGATES, COLOURS, strict=False))
LARGE = 0.95
"""Quantile of the KL over updates that stands for large updates."""
HOLDS = 0.5
"""A learning rate still works if its final return is above this share of the surrogate's best one."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainedFigureConfig):
    """PPO on CartPole with and without the clip, from small to large learning rates (kept constant)."""

    env: str = "CartPole-v1"
    """Gymnasium id; its PPO preset is used, with the changes of this figure."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to compare."""
    num_epochs: int = 20
    """Epochs over each rollout: the more, the farther the unclipped surrogate moves the policy."""
    total_steps: int = 40_000
    """Environment steps of every run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.learning_rates) < 2 or any(not 0 < rate < 10 for rate in self.learning_rates):
            raise InputError(f"learning_rates must be two or more, each above 0; got {list(self.learning_rates)}.")


def jobs(config: Config) -> list[Job]:
    return [
        Job(_name(surrogate, rate, seed), _spec(config, surrogate, rate, seed))
        for seed in range(config.seeds)
        for rate in sorted(config.learning_rates)
        for surrogate in SURROGATES
    ]


def _name(surrogate: str, rate: float, seed: int) -> str:
    return f"{surrogate}-lr{rate:g}-seed{seed}"


def _spec(config: Config, surrogate: str, rate: float, seed: int) -> Any:
    changes = {
        "surrogate": surrogate,
        "learning_rate": rate,
        "lr_schedule": "constant",
        "anneal_clip": False,
        "num_epochs": config.num_epochs,
    }
    return config.spec(config.env, "ppo", seed, changes=changes)


def numbers(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Final return and KL of large updates, as [learning rate][seed], for each surrogate."""
    rates = sorted(config.learning_rates)
    table: dict[str, Any] = {}
    for surrogate in SURROGATES:
        runs = [[results[_name(surrogate, rate, seed)] for seed in range(config.seeds)] for rate in rates]
        table[surrogate] = {
            "final_return": [[run["evaluations"][-1]["mean"] for run in row] for row in runs],
            "large_kl": [[_large_kl(run) for run in row] for row in runs],
        }
    return {
        "env": config.env,
        "seeds": config.seeds,
        "total_steps": config.total_steps,
        "num_epochs": config.num_epochs,
        "final_episodes": config.final_episodes,
        "learning_rates": rates,
        **table,
    }


def _large_kl(run: Mapping[str, Any]) -> float | None:
    """The KL that one update in twenty exceeds. Not the median: a policy that collapsed to one action stays put."""
    kls = [kl for kl in run["kl_per_update"] if kl is not None]
    return float(np.quantile(kls, LARGE)) if kls else None


def draw(numbers: Mapping[str, Any]) -> Any:
    figure = new_figure(10.5, 4.4)
    returns, kls = figure.subplots(1, 2)
    rates = numbers["learning_rates"]
    for surrogate in SURROGATES:
        label = "clipped surrogate (PPO)" if surrogate == "clipped" else "unclipped surrogate r A"
        line: dict[str, Any] = {"colour": COLOUR[surrogate], "label": label, "marker": "o", "markersize": 4}
        band(returns, rates, np.array(numbers[surrogate]["final_return"]).T, **line)
        band(kls, rates, np.array(numbers[surrogate]["large_kl"], dtype=float).T, **line)
    for axes in (returns, kls):
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    kls.set_yscale("log")
    tidy(
        returns,
        title=f"return after {steps_text(numbers['total_steps'])} steps",
        x="learning rate (constant, log scale)",
        y=f"mean return of {numbers['final_episodes']} greedy episodes",
    )
    tidy(
        kls,
        title="how far updates move the policy (1 in 20 goes farther)",
        x="learning rate (constant, log scale)",
        y="95 % quantile of KL(old || new), exact, nats (log)",
    )
    kls.set_ylim(bottom=max(1e-4, kls.get_ylim()[0]))  # a policy that has saturated does not move at all
    returns.set_ylim(bottom=0 if np.nanmin(returns.get_ylim()) > -50 else None)
    returns.legend(fontsize="small", frameon=False, loc="best")
    figure.suptitle(
        f"{numbers['env']}, {numbers['num_epochs']} epochs per rollout, {seeds_text(numbers['seeds'])}",
        fontsize="large",
    )
    return figure


def verdict(numbers: Mapping[str, Any]) -> str:
    """Says up to which learning rate each surrogate still works."""
    lines = []
    rates = numbers["learning_rates"]
    for surrogate in SURROGATES:
        finals = np.median(numbers[surrogate]["final_return"], axis=1)
        best = int(finals.argmax())
        broken = [
            rate
            for rate, final in zip(rates, finals, strict=True)
            if rate > rates[best] and final < HOLDS * finals[best]
        ]
        fate = (
            f"falls below half of it from {broken[0]:g} on"
            if broken
            else f"keeps more than half of it up to {rates[-1]:g}"
        )
        lines.append(f"{surrogate}: best final return {finals[best]:.0f} at learning rate {rates[best]:g}; {fate}.")
    kl = {name: _median(numbers[name]["large_kl"][-1]) for name in SURROGATES}
    lines.append(
        f"At the largest learning rate one update in twenty moves the policy by more than {kl['unclipped']:.2g} nats "
        f"without the clip, and {kl['clipped']:.2g} with it."
    )
    return "\n".join(lines)


def _median(values: list[float | None]) -> float:
    return float(np.nanmedian(np.array(values, dtype=float)))
