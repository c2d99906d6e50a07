"""Settings that the figures share."""

from dataclasses import dataclass
from typing import Any

from gym_baselines.measuring.meter import RunSpec
from rlhf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FigureConfig:
    output_dir: str | None = None
    """Folder of the picture, its numbers and the runs they come from; runs/plot-NAME if null."""


@dataclass(frozen=True, kw_only=True)
class TrainedFigureConfig(FigureConfig):
    """Figures that train. A small `total_steps` and `seeds` give a quick look."""

    seeds: int = 3
    """Runs of each variant, with seeds 0, 1, ..."""
    total_steps: int = 100_000
    """Environment steps of every run."""
    eval_every: int = 5_000
    """Environment steps between two evaluations."""
    eval_episodes: int = 20
    """Greedy episodes of each evaluation."""
    final_episodes: int = 50
    """Greedy episodes of the evaluation at the end."""
    workers: int = 1
    """Runs at the same time, one thread each."""
    overwrite: bool = False
    """Train again instead of drawing the results that the folder holds."""

    def __post_init__(self) -> None:
        for name in ("seeds", "total_steps", "eval_every", "eval_episodes", "final_episodes", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def spec(self, env: str, algorithm: str, seed: int, **options: Any) -> RunSpec:
        """A run of this figure. options: changes, series, measure_kl."""
        return RunSpec(
            env=env,
            algorithm=algorithm,
            seed=seed,
            total_steps=self.total_steps,
            eval_every=self.eval_every,
            eval_episodes=self.eval_episodes,
            final_episodes=self.final_episodes,
            **options,
        )
