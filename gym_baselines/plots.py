"""`python -m gym_baselines plot NAME`: draws a figure, writes its numbers as JSON, and states the result in words.

Each run is measured in its own process and kept as JSON in the output folder, so a figure can be redrawn without
training.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from gym_baselines.figures import clip_objective, gae_lambda, penalty, step_size, vector_envs
from gym_baselines.figures.style import save
from gym_baselines.measuring.jobs import run_jobs
from gym_baselines.measuring.measure import write_json
from rlhf.commands.cli import parse
from rlhf.errors import InputError

FIGURES: dict[str, ModuleType] = {
    "clip-objective": clip_objective,
    "step-size": step_size,
    "gae-lambda": gae_lambda,
    "penalty": penalty,
    "vector-envs": vector_envs,
}
"""Each module has Config (settings), jobs (runs to make), numbers (computed from the results), draw (makes the picture)
and verdict (the result in words)."""


def usage() -> str:
    lines = [f"  {name:<16}{str(module.Config.__doc__).splitlines()[0]}" for name, module in FIGURES.items()]
    return (
        "usage: python -m gym_baselines plot NAME [--seeds 3 --total_steps 20000 ...; --help lists all]\n\n"
        + "\n".join(lines)
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in (*FIGURES, "-h", "--help"):
        raise InputError(f"plot: there is no figure {arguments[0]!r}; choose from {', '.join(FIGURES)}.")
    if not arguments or arguments[0] not in FIGURES:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(usage(), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    plot(arguments[0], arguments[1:])


def plot(name: str, argv: Sequence[str] = ()) -> Path:
    """Make the figure and return the path of its picture."""
    figure = FIGURES[name]
    config = parse(figure.Config, list(argv), description=str(figure.Config.__doc__).splitlines()[0])
    folder = Path(config.output_dir or f"runs/plot-{name}")
    jobs = figure.jobs(config)
    results = {}
    if jobs:
        results = run_jobs(jobs, folder, workers=config.workers, overwrite=config.overwrite, description=name)
    numbers = figure.numbers(config, results)
    write_json(folder / f"{name}.json", numbers)
    save(figure.draw(numbers), folder / f"{name}.png")
    print(f"\n{figure.verdict(numbers)}\n{folder / f'{name}.png'} and {name}.json")
    return folder / f"{name}.png"
