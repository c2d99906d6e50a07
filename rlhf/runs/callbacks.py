"""Callbacks: hooks through which a user's code takes part in a run."""

from typing import Any


class Callback:
    """Hooks of a run; override those you need. Set `trainer.should_stop = True` to end the run after the current step.

    trainer: the object that runs the training (`rlhf.Trainer`, or `gym_baselines.train.Training` on control tasks).
    metrics: a copy of the step's line in metrics.jsonl. Every process calls the hooks.
    """

    def on_train_start(self, trainer: Any) -> None: ...
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None: ...
    def on_evaluate(self, trainer: Any, step: int, metrics: dict[str, float]) -> None: ...
    def on_train_end(self, trainer: Any) -> None: ...
