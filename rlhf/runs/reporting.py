"""Console output of a run: report lines and a progress bar."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

from tqdm.auto import tqdm


def unheard() -> AbstractContextManager[None]:
    """Ignore that nobody reads the output any more (a closed terminal, a pipe whose reader ended): the run goes on."""
    return suppress(OSError, ValueError)  # ValueError: the file is closed


def say(text: str) -> None:
    """Print one line of a run's report, without garbling the progress bar."""
    with unheard():
        tqdm.write(f"rlhf: {text}")


class Display:
    """How a run displays its steps. This base class shows nothing, and passes metrics to trackers unchanged."""

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        """Called after each step, which took `seconds`."""

    def tracked(self, step: int, metrics: Mapping[str, float], seconds: float) -> tuple[int, Mapping[str, float]]:
        """(position on the tracker's step axis, metrics to log there)."""
        return step, metrics

    def close(self) -> None: ...


ON_BAR = {"score": "score", "reward": "reward", "reward_kl": "kl"}
"""Metric -> its name on the bar of a language model's run."""


class StepBar(Display):
    """A progress bar that counts steps and shows the score, the KL and the seconds per step."""

    def __init__(self, *, first_step: int, total_steps: int, hidden: bool = False) -> None:
        self._bar: Any = tqdm(total=total_steps, initial=first_step, desc="train", unit="step", disable=hidden)

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        shown = {name: metrics[metric] for metric, name in ON_BAR.items() if metric in metrics}
        self._bar.set_postfix({n: f"{v:.3g}" for n, v in {**shown, "s/step": seconds}.items()}, refresh=False)
        with unheard():
            self._bar.update()

    def close(self) -> None:
        with unheard():
            self._bar.close()
