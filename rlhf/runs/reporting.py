"""What a person sees of a run while it goes on: lines, and a progress bar."""

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm


def say(text: str) -> None:
    """One line of a run's report, in step with the progress bar."""
    tqdm.write(f"rlhf: {text}")


class Display:
    """How a run shows its steps: here not at all, and trackers get every metric under its own name."""

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        """A step is done that took so many seconds."""

    def tracked(self, step: int, metrics: Mapping[str, float], seconds: float) -> tuple[int, Mapping[str, float]]:
        """(place on a tracker's axis, the numbers to show there)."""
        return step, metrics

    def close(self) -> None: ...


ON_BAR = {"score": "score", "reward": "reward", "reward_kl": "kl"}
"""Metric -> its name on the bar of a language model's run."""


class StepBar(Display):
    """A bar that counts steps, with the numbers that tell how the run is doing."""

    def __init__(self, *, first_step: int, total_steps: int, hidden: bool = False) -> None:
        self._bar: Any = tqdm(total=total_steps, initial=first_step, desc="train", unit="step", disable=hidden)

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        shown = {name: metrics[metric] for metric, name in ON_BAR.items() if metric in metrics}
        self._bar.set_postfix({n: f"{v:.3g}" for n, v in {**shown, "s/step": seconds}.items()}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
