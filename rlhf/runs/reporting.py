"""Console output of a run: report lines and a progress bar."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm


class Unheard:
    """A stream that ignores that nobody reads it any more (a closed terminal, a pipe whose reader ended): runs go on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # tqdm asks whether a bar is on the terminal
        return other is self._stream or (isinstance(other, Unheard) and other._stream is self._stream)

    def __hash__(self) -> int:
        return hash(self._stream)


def say(text: str) -> None:
    """Print one line of a run's report, without garbling the progress bar."""
    tqdm.write(f"rlhf: {text}", file=Unheard(sys.stdout))


def progress_bar(**options: Any) -> Any:
    """A tqdm bar on standard error, which outlives it."""
    return tqdm(file=Unheard(sys.stderr), **options)


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
        self._bar = progress_bar(total=total_steps, initial=first_step, desc="train", unit="step", disable=hidden)

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        shown = {name: metrics[metric] for metric, name in ON_BAR.items() if metric in metrics}
        self._bar.set_postfix({n: f"{v:.3g}" for n, v in {**shown, "s/step": seconds}.items()}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
