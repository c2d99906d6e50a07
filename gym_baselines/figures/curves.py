"""Learning curves of several algorithms: median over seeds, and the range between the worst and the best seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gym_baselines.figures.style import COLOURS, at_grid, band, common_grid, new_figure, seeds_text, tidy


def evaluation_points(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(point["steps"], point["mean"]) for point in result["evaluations"]]


def draw_curves(
    results: Mapping[str, Sequence[Mapping[str, Any]]], *, env: str, every: int, threshold: float | None, episodes: int
) -> Any:
    """Draw one curve per algorithm. The steps axis is logarithmic if training lengths differ more than 3 times.

    Args:
        results: Algorithm -> one result per seed.
        env: Name of the environment, for the title.
        every: Environment steps between two evaluations.
        threshold: Return that counts as solved, drawn as a line; None for no line.
        episodes: Episodes of each evaluation, for the label.

    Returns:
        A matplotlib Figure.
    """
    figure = new_figure(8.0, 4.6)
    axes = figure.subplots()
    ends = []
    for (algorithm, runs), colour in zip(results.items(), COLOURS * 2, strict=False):
        curves = [evaluation_points(run) for run in runs]
        grid = common_grid(curves, every)
        dashed = {"linestyle": "--"} if algorithm.startswith("sb3_") else {}
        band(axes, grid, np.array([at_grid(curve, grid) for curve in curves]), colour=colour, label=algorithm, **dashed)
        ends.append(grid[-1])
    if threshold is not None:
        axes.axhline(threshold, color="grey", linewidth=1, linestyle=":", label=f"threshold {threshold:g}")
    if max(ends) > 3 * min(ends):
        axes.set_xscale("log")
    seeds = max(map(len, results.values()))
    tidy(
        axes,
        title=f"{env}: learning curves, {seeds_text(seeds)}",
        x="environment steps" + (" (log scale)" if axes.get_xscale() == "log" else ""),
        y=f"mean return of {episodes} greedy episodes",
    )
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    axes.legend(fontsize="small", frameon=False, ncols=2 if len(results) > 4 else 1)
    return figure
