"""Settings that the figures share."""

from dataclasses import dataclass
from typing import Any

from gym_baselines.measuring.meter import RunSpec
from rlhf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FigureConfig:
    """Settings of every figure."""

    output_dir: str | None = None
    """Folder of the picture, its numbers and the runs they come from; runs/plot-NAME if null."""


@dataclass(frozen=True, kw_only=True)
class TrainedFigureConfig(FigureConfig):
    """Settings of figures that need training. Lower `total_steps` and `seeds` for a quick look."""

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
    """Train again, even if the folder already holds results."""

    def __post_init__(self) -> None:
        for name in ("seeds", "total_steps", "eval_every", "eval_episodes", "final_episodes", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def spec(self, env: str, algorithm: str, seed: int, **options: Any) -> RunSpec:
        """The specification of one run of this figure. options: changes, series and measure_kl of RunSpec."""
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
