"""Plots curves of a run's metrics."""

import math
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import InputError
from rlhf.runs.jsonlines import read_metrics
from rlhf.runs.metrics import TABLE


def plot_curves(path: str | Path, png: str | Path, names: Sequence[str]) -> None:
    """Plot the metrics `names` of a run over its steps, one panel each, into the file `png`."""
    lines = read_metrics(path)
    missing = [name for name in names if all(line.get(name) is None for line in lines)]
    if missing or not names:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise InputError(f"{path} has no values of {missing or 'an empty list of names'}; it has {known}.")
    try:
        from matplotlib.figure import Figure  # not pyplot: no display and no global state needed
    except ImportError as error:
        raise InputError("Curves need matplotlib: pip install rlhf-toolkit[plots]") from error
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, panel in zip(names, panels, strict=False):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        panel.plot(*zip(*points, strict=True), linewidth=1.4, marker="o" if len(points) < 30 else None, markersize=3)
        unit = TABLE[name].unit if name in TABLE else ""
        panel.set(title=name, xlabel="step", ylabel=unit if unit not in ("", "1") else "value")
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(names) :]:
        panel.set_visible(False)
    figure.savefig(str(png), dpi=120)
