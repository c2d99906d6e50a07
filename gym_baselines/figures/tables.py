"""The tables of `compare`: statistics over seeds, computed from the results of runs, as markdown and plain text."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from gym_baselines.figures.style import steps_text

Results = Sequence[Mapping[str, Any]]

QUOTED = {
    "reinforce": ("low", "low", "low"),
    "a2c": ("medium", "medium", "medium"),
    "trpo": ("high", "high", "high"),
    "ppo": ("medium", "high", "high"),
    "sac": ("medium", "high", "high"),
}
"""(complexity, sample efficiency, stability) as tutorials usually rate them."""


class Summary(NamedTuple):
    """Statistics of one algorithm over its seeds. A seed that never reached the threshold counts as infinitely late."""

    algorithm: str
    seeds: int
    steps: float
    """Environment steps trained for, median."""
    final: tuple[float, float, float]
    """Return at the end: median, smallest, largest."""
    drop: float
    """Best evaluation minus the last, median."""
    reached: int | None
    """How many seeds reached the threshold; None if there is no threshold."""
    steps_to_threshold: float
    cpu_s_to_threshold: float
    cpu_us_per_step: float
    peak_mib: float
    kl_per_update: float | None
    lines: int | None
    own_lines: int | None
    """Executed lines except those that all compared algorithms of the same library execute."""


def summarize(
    algorithm: str, results: Results, threshold: float | None, lines: tuple[int, int | None] | None
) -> Summary:
    ends = [result["evaluations"][-1]["mean"] for result in results]
    best = [max(point["mean"] for point in result["evaluations"]) for result in results]
    first = [first_at(result, threshold) for result in results]
    kls = [kl for result in results for kl in result["kl_per_update"] if kl is not None]
    return Summary(
        algorithm=algorithm,
        seeds=len(results),
        steps=median(result["steps"] for result in results),
        final=(median(ends), min(ends), max(ends)),
        drop=median(top - end for top, end in zip(best, ends, strict=True)),
        reached=None if threshold is None else sum(point is not None for point in first),
        steps_to_threshold=median(point["steps"] if point else math.inf for point in first),
        cpu_s_to_threshold=median(point["cpu_s"] if point else math.inf for point in first),
        cpu_us_per_step=median(1e6 * result["cpu_s"] / result["steps"] for result in results),
        peak_mib=median(result["peak_memory_bytes"] / 2**20 for result in results),
        kl_per_update=median(kls) if kls else None,
        lines=lines[0] if lines else None,
        own_lines=lines[1] if lines else None,
    )


def first_at(result: Mapping[str, Any], threshold: float | None) -> Mapping[str, float] | None:
    """The first evaluation whose mean return reaches the threshold."""
    reached = (point for point in result["evaluations"] if threshold is not None and point["mean"] >= threshold)
    return next(reached, None)


def count_lines(
    lines: Mapping[str, Mapping[str, Sequence[int]]], library_of: Mapping[str, str]
) -> dict[str, tuple[int, int | None]]:
    """Algorithm -> (executed lines, those that not all compared algorithms of its library execute; None if alone)."""
    sets: dict[str, set[tuple[str, int]]] = {
        name: {(file, line) for file in files for line in files[file]} for name, files in lines.items()
    }
    counts: dict[str, tuple[int, int | None]] = {}
    for name, own in sets.items():
        family = [sets[other] for other in sets if library_of[other] == library_of[name]]
        counts[name] = (len(own), len(own - family[0].intersection(*family)) if len(family) > 1 else None)
    return counts


def measured_table(summaries: Sequence[Summary], threshold: float | None) -> list[list[str]]:
    """Header and rows, as text."""
    goal = f"{threshold:g}" if threshold is not None else "a threshold"
    head = ["algorithm", "steps", "final return (min..max)", f"steps to {goal}", f"CPU s to {goal}"]
    head += ["CPU us per step", "peak memory", "KL per update", "lines of code"]
    rows = []
    for one in summaries:
        middle, low, high = one.final
        rows.append(
            [
                one.algorithm,
                steps_text(one.steps),
                f"{middle:.1f} ({low:.1f}..{high:.1f})",
                "-" if one.reached is None else f"{_steps(one.steps_to_threshold)} ({one.reached}/{one.seeds})",
                _seconds(one.cpu_s_to_threshold),
                f"{one.cpu_us_per_step:.0f}",
                f"{one.peak_mib:.0f} MiB",
                "-" if one.kl_per_update is None else f"{one.kl_per_update:.2g}",
                "-"
                if one.lines is None
                else f"{one.lines}" + ("" if one.own_lines is None else f" ({one.own_lines} own)"),
            ]
        )
    return [head, *rows]


def quoted_table(summaries: Sequence[Summary], threshold: float | None) -> list[list[str]]:
    """The usual ratings, each next to what was measured here. Header and rows, as text."""
    goal = f"{threshold:g}" if threshold is not None else "a threshold"
    head = ["algorithm", "complexity", "own lines / all", "sample efficiency", f"steps to {goal}", "stability"]
    head += ["final min..max", "best - final"]
    rows = []
    for one in summaries:
        words = QUOTED.get(one.algorithm.removeprefix("sb3_"), ("-", "-", "-"))
        _, low, high = one.final
        own = "-" if one.own_lines is None else f"{one.own_lines}"
        rows.append(
            [
                one.algorithm,
                words[0],
                "-" if one.lines is None else f"{own} / {one.lines}",
                words[1],
                "-" if one.reached is None else f"{_steps(one.steps_to_threshold)} ({one.reached}/{one.seeds})",
                words[2],
                f"{low:.1f}..{high:.1f}",
                f"{one.drop:.1f}",
            ]
        )
    return [head, *rows]


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def plain(table: Sequence[Sequence[str]]) -> str:
    """The table as text with aligned columns, the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def _steps(value: float) -> str:
    return "not reached" if math.isinf(value) else steps_text(value)


def _seconds(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.1f}"
