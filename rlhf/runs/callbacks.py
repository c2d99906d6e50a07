"""What a user's code may do during a run."""

from typing import Any


class Callback:
    """Hooks of a run; override what you need. Set `trainer.should_stop = True` to end after the current step.

    trainer: the object that trains (`rlhf.Trainer`; on control tasks `gym_baselines.train.Training`). metrics: a copy of
    the step's line in metrics.jsonl. Hooks are called on every process.
    """

    def on_train_start(self, trainer: Any) -> None: ...
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None: ...
    def on_evaluate(self, trainer: Any, step: int, metrics: dict[str, float]) -> None: ...
    def on_train_end(self, trainer: Any) -> None: ...
