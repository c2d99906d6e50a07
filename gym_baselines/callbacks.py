"""Callbacks for training on environments: functions called after every update as function(agent, metrics).

Returning False stops the training. For hooks at other moments, pass an `rlhf.Callback` instead.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gym_baselines.agent import Agent
from gym_baselines.evaluate import Evaluation, evaluate
from rlhf.errors import InputError
from rlhf.runs.callbacks import Callback

StepFunction = Callable[[Agent, dict[str, float]], bool | None]
"""Called after every update with the agent and the step's metrics; returning False stops the training."""


class AfterUpdate(Callback):
    """A `StepFunction` as a callback."""

    def __init__(self, function: StepFunction) -> None:
        self.function = function

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        answer = self.function(trainer.agent, metrics)
        if answer is not None and not answer:
            trainer.should_stop = True


class _Every:
    """Base of callbacks that act whenever the run passes a multiple of `every` environment steps."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 environment step, got {every}.")
        self.every = every
        self._passed = 0

    def is_due(self, agent: Agent) -> bool:
        before = self._passed
        self._passed = agent.environment_steps // self.every
        return self._passed > before


class Evaluate(_Every):
    """Evaluates the greedy policy during training, and can keep the best agent or stop at a given return."""

    def __init__(
        self,
        every: int,
        *,
        episodes: int = 20,
        seed: int = 0,
        best_dir: str | Path | None = None,
        stop_at: float | None = None,
    ) -> None:
        """Set what to do.

        Args:
            every: Environment steps between two evaluations.
            episodes: Episodes of each evaluation.
            seed: Seed of the start states.
            best_dir: Folder in which to save the best agent so far, if given.
            stop_at: Mean return at which to stop the training, if given.
        """
        super().__init__(every)
        self.episodes = episodes
        self.seed = seed
        self.best_dir = best_dir
        self.stop_at = stop_at
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
    """Saves the agent to directory/<environment steps>, to keep earlier ones. (Runs resume from output_dir instead.)"""

    def __init__(self, every: int, directory: str | Path) -> None:
        super().__init__(every)
        self.directory = Path(directory)

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        if self.is_due(agent):
            agent.save(self.directory / str(agent.environment_steps))
        return True


class StopAtReturn:
    """Stops the training when the mean return of its last 100 episodes reaches `episode_return`."""

    def __init__(self, episode_return: float) -> None:
        self.episode_return = episode_return

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        return metrics.get("episode_return", float("-inf")) < self.episode_return


class StopAfter:
    """Stops the training after `seconds`, counted from the creation of this callback."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __call__(self, agent: Agent, metrics: dict[str, float]) -> bool:
        return time.monotonic() < self.end
