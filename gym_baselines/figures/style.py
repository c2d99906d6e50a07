"""What all figures share: colours that most people can tell apart, bands over seeds, files. No pyplot, no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import InputError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6bb1", "#7f7f7f", "#a6761d")
"""The first seven are Okabe and Ito's, which differ for colour-blind readers too."""


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure; inches."""
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
    """Median and min..max over the seeds. by_seed: (seeds, points), may hold NaN."""
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
    """The points' values by linear interpolation at `grid`; NaN before the first point and after the last."""
    steps, values = np.array(points, dtype=float).T
    return np.interp(grid, steps, values, left=np.nan, right=np.nan)


def common_grid(curves: Sequence[Sequence[tuple[float, float]]], every: float) -> np.ndarray:
    """Multiples of `every` that all curves cover (their nearest ends, if none)."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = np.arange(np.ceil(first / every), np.floor(last / every) + 1) * every
    return np.unique([first, *grid, last]) if first <= last else np.array([first])
