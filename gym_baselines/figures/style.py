"""Helpers for all figures: colours, bands over seeds, saving. Without pyplot, so no display is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import InputError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6bb1", "#7f7f7f", "#a6761d")
"""The first seven are those of Okabe and Ito, which colour-blind readers can tell apart too."""


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure. width, height: in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Figures need matplotlib: pip install 'rlhf-toolkit[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def tidy(axes: Any, *, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def band(axes: Any, x: Any, by_seed: np.ndarray, *, colour: str, label: str, **line: Any) -> None:
    """Draw the median over seeds as a line, and min..max as a band.

    Args:
        axes: Where to draw.
        x: (points,)
        by_seed: (seeds, points), may hold NaN.
        colour: Of line and band.
        label: Of the line, in the legend.
        line: Further options of the line.
    """
    axes.fill_between(x, np.nanmin(by_seed, 0), np.nanmax(by_seed, 0), color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, np.nanmedian(by_seed, 0), color=colour, label=label, **{"linewidth": 1.8, **line})


def seeds_text(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds: median and min..max"


def steps_text(steps: float) -> str:
    """15000 -> 15k, 1500000 -> 1.5M."""
    if steps >= 1e6:
        return f"{steps / 1e6:.3g}M"
    return f"{steps / 1e3:.3g}k" if steps >= 1e3 else f"{steps:.0f}"


def at_grid(points: Sequence[tuple[float, float]], grid: Any) -> np.ndarray:
    """The values of `points`, (steps, value), interpolated linearly at `grid`; NaN outside their range."""
    steps, values = np.array(points, dtype=float).T
    return np.interp(grid, steps, values, left=np.nan, right=np.nan)


def common_grid(curves: Sequence[Sequence[tuple[float, float]]], every: float) -> np.ndarray:
    """The range of steps that all curves cover: its ends and multiples of `every`. One point if there is none."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = np.arange(np.ceil(first / every), np.floor(last / every) + 1) * every
    return np.unique([first, *grid, last]) if first <= last else np.array([first])
