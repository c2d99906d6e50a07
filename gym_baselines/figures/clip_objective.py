"""Figure of PPO's clipped objective against the probability ratio, for several advantages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gym_baselines.figures.settings import FigureConfig
from gym_baselines.figures.style import COLOURS, new_figure, tidy
from gym_baselines.measuring.jobs import Job
from rlhf.core.losses import clipped_surrogate
from rlhf.errors import InputError

ADVANTAGES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
POINTS = 201


@dataclass(frozen=True, kw_only=True)
class Config(FigureConfig):
    """The clipped objective of one action, as the probability ratio to the old policy changes."""

    clip_range: float = 0.2
    """epsilon: beyond 1 +- this, the objective no longer rewards a larger change of the ratio."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < 0.5:
            raise InputError(f"clip_range must lie between 0 and 0.5, the range that is drawn; got {self.clip_range}.")


def jobs(config: Config) -> list[Job]:
    return []


def numbers(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """The objective (minus the loss), by the function that training uses, at 201 ratios in [0.5, 1.5]."""
    ratio = torch.linspace(0.5, 1.5, POINTS, dtype=torch.float64)[None]
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None]
    logprobs = ratio.log().expand(len(ADVANTAGES), -1)
    mask = torch.ones(len(ADVANTAGES), POINTS, dtype=torch.bool)
    loss = clipped_surrogate(
        logprobs,
        torch.zeros_like(logprobs),
        advantages.expand_as(logprobs),
        mask,
        clip_low=config.clip_range,
        clip_high=config.clip_range,
    )
    return {
        "clip_range": config.clip_range,
        "ratio": ratio[0].tolist(),
        "advantages": list(ADVANTAGES),
        "objective": (-loss).tolist(),
    }


def draw(numbers: Mapping[str, Any]) -> Any:
    figure = new_figure(10.5, 5.0)
    panels = figure.subplots(1, 2)
    low, high = 1 - numbers["clip_range"], 1 + numbers["clip_range"]
    for axes, positive in zip(panels, (True, False), strict=True):
        curves = zip(numbers["advantages"], numbers["objective"], COLOURS[:3] + COLOURS[2::-1], strict=True)
        for advantage, objective, colour in curves:
            if (advantage > 0) == positive:
                axes.plot(numbers["ratio"], objective, color=colour, linewidth=2, label=f"A = {advantage:+g}")
        for bound, name in ((low, "1 - epsilon, 1 + epsilon"), (high, None)):
            axes.axvline(bound, color="grey", linestyle="--", linewidth=1, label=name)
        axes.axvline(1, color="lightgrey", linewidth=1)
        sign = "good actions (A > 0)" if positive else "bad actions (A < 0)"
        tidy(
            axes,
            title=sign,
            x="ratio r = new probability / old probability",
            y="L_CLIP = min(r A, clip(r) A), maximised",
        )
        axes.legend(fontsize="small", loc="upper left" if positive else "lower left", frameon=False)
    _explain(panels, low, high)
    figure.suptitle(f"PPO's clipped objective, epsilon = {numbers['clip_range']:g}", fontsize="large")
    return figure


def _explain(panels: Sequence[Any], low: float, high: float) -> None:
    """Annotate the curves of |A| = 2 with what they show."""
    arrow = {"arrowstyle": "->", "color": "black", "linewidth": 0.9}
    note = {"fontsize": "small", "arrowprops": arrow, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
    good, bad = panels
    good.set(ylim=(-0.3, 3.9))
    good.annotate(
        "flat above 1 + epsilon: already\nlikelier by enough, no more gain",
        xy=(high + 0.14, 2 * high),
        xytext=(1.02, 3.2),
        **note,
    )
    good.annotate(
        "not flat here: became less likely,\nis pulled back up",
        xy=(low - 0.1, 2 * (low - 0.1)),
        xytext=(0.5, 2.05),
        **note,
    )
    bad.set(ylim=(-4.4, 0.3))
    bad.annotate(
        "flat below 1 - epsilon: already\nrarer by enough, no more gain",
        xy=(low - 0.14, -2 * low),
        xytext=(0.5, -2.45),
        **note,
    )
    bad.annotate(
        "NOT flat above 1 + epsilon: min keeps the\nsmaller, unclipped branch r A. A bad action\n"
        "that became likelier is always pushed\nback, however far it has gone",
        xy=(high + 0.15, -2 * (high + 0.15)),
        xytext=(0.92, -4.0),
        **note,
    )


def verdict(numbers: Mapping[str, Any]) -> str:
    low, high = 1 - numbers["clip_range"], 1 + numbers["clip_range"]
    return (
        "The objective is flat only where the change has already gone far enough in the wanted direction: above "
        f"r = {high:g} for a good action, below r = {low:g} for a bad one. On the other sides the unclipped branch r A is "
        "the smaller, min keeps it, and a step that went wrong is always corrected."
    )
