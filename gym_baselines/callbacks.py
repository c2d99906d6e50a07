"""What may happen after every update of a run: functions called as function(agent, metrics); returning False ends the
training. Hooks at other moments: `rlhf.Callback`, which is taken in their place."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gym_baselines.agent import Agent
from gym_baselines.evaluate import Evaluation, evaluate
from rlhf.errors import InputError
from rlhf.runs.callbacks import Callback

StepFunction = Callable[[Agent, dict[str, float]], bool | None]
"""Called after every update with the agent and the step's metrics; returning False ends the training."""


class AfterUpdate(Callback):
    """A `StepFunction` as a callback."""

    def __init__(self, function: StepFunction) -> None:
        self.function = function

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        answer = self.function(trainer.agent, metrics)
        if answer is not None and not answer:
            trainer.should_stop = True


class _Every:
    """Acts when the run passes a multiple of `every` environment steps."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 environment step, got {every}.")
        self.every, self._passed = every, 0

    def is_due(self, agent: Agent) -> bool:
        before, self._passed = self._passed, agent.environment_steps // self.every
        return self._passed > before


class Evaluate(_Every):
    """Evaluates the greedy policy; keeps the best agent in `best_dir` and stops at the return `stop_at`, if given."""

    def __init__(
        self,
        every: int,
        *,
        episodes: int = 20,
        seed: int = 0,
        best_dir: str | Path | None = None,
        stop_at: float | None = None,
    ) -> None:
        super().__init__(every)
        self.episodes, self.seed, self.best_dir, self.stop_at = episodes, seed, best_dir, stop_at
        self.history: list[tuple[int, Evaluation]] = []
        """(environment steps, evaluation) of every evaluation so far."""

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        if not self.is_due(agent):
            return True
        result = evaluate(agent, episodes=self.episodes, seed=self.seed)
        is_best = all(result.mean > earlier.mean for _, earlier in self.history)
        self.history.append((agent.environment_steps, result))
        if is_best and self.best_dir is not None:
            agent.save(self.best_dir)
        return self.stop_at is None or result.mean < self.stop_at


class SaveEvery(_Every):
    """Saves the agent to directory/<environment steps>, for looking at earlier ones; runs are resumed from output_dir."""

    def __init__(self, every: int, directory: str | Path) -> None:
        super().__init__(every)
        self.directory = Path(directory)

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        if self.is_due(agent):
            agent.save(self.directory / str(agent.environment_steps))
        return True


class StopAtReturn:
    """Stops when the mean return of the last 100 training episodes reaches `episode_return`."""

    def __init__(self, episode_return: float) -> None:
        self.episode_return = episode_return

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        return metrics.get("episode_return", float("-inf")) < self.episode_return


class StopAfter:
    """Stops after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        return time.monotonic() < self.end
