"""What a person sees of a run: the lines at its start, the progress bar, and the files of metrics and completions."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rlhf.runs.jsonlines import JsonLines, MetricsWriter
from rlhf.runs.metrics import unknown_names

COMPLETIONS_FILE = "completions.jsonl"


def say(text: str) -> None:
    """One line of a run's report, in step with the progress bar."""
    tqdm.write(f"rlhf: {text}")


class RunLog:
    """metrics.jsonl, times.jsonl and completions.jsonl of one run, and its progress bar. The main process makes one."""

    def __init__(self, output_dir: str | Path, *, first_step: int, total_steps: int) -> None:
        """Continues the files where `first_step` begins: later lines, of a run that was interrupted, are cut."""
        self._metrics = MetricsWriter(output_dir)
        self._metrics.truncate_to(first_step - 1)
        self._completions = JsonLines(Path(output_dir) / COMPLETIONS_FILE)
        self._completions.truncate_to(first_step - 1)
        self._bar = tqdm(total=total_steps, initial=first_step, desc="train", unit="step")
        self._clock = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float], completions: Sequence[Mapping[str, Any]]) -> None:
        """One line of metrics, one of seconds, one per completion, and the bar."""
        unknown = unknown_names(metrics)
        assert not unknown, f"add {unknown} to the table in rlhf/runs/metrics.py"
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        self._metrics.write(step, metrics, {"step_s": seconds})
        for row in completions:
            self._completions.write(step, row)
        score = {name: metrics.get(name) for name in ("score", "reward")}
        shown = {**score, "kl": metrics.get("reward_kl"), "s/step": seconds}
        self._bar.set_postfix(
            {name: f"{value:.3g}" for name, value in shown.items() if value is not None}, refresh=False
        )
        self._bar.update()

    def sync(self) -> None:
        self._metrics.sync()
        self._completions.sync()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self._completions.close()
