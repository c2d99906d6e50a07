"""Measures a training run while it runs: evaluations, seconds, and the KL of every update.

The clocks are paused during evaluations and measurements. Progress goes to stdout as JSON lines.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gym_baselines.envs.environments import EVALUATION, EnvironmentConfig, make_env

PROBE_ENVS, PROBE_STEPS, PROBE_STRIDE = 8, 128, 4
"""The KL of updates is measured at the states of every 4th of 128 steps of 8 environments, 256 in all."""
LAST_RETURNS = 20
"""How many returns of the last training episodes a result keeps."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Settings that decide the result of a run, and what to measure during it."""

    env: str
    algorithm: str
    seed: int
    total_steps: int
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the preset, by name."""
    eval_every: int
    """Environment steps between two evaluations."""
    eval_episodes: int = 20
    final_episodes: int = 100
    """Episodes of the evaluation at the end."""
    series: tuple[str, ...] = ()
    """Metrics to keep from every update."""
    measure_kl: bool = True


class Player(Protocol):
    """A policy in training, whichever library it belongs to."""

    env: str
    options: EnvironmentConfig
    """How its environments are made."""

    def evaluate(self, episodes: int, seed: int) -> np.ndarray:
        """Returns of complete greedy episodes, (episodes,), whose start states depend on (seed, episode)."""

    def sample(self, observations: np.ndarray, step: int) -> np.ndarray:
        """Actions sampled from the policy, as the environment takes them."""

    def distribution(self, observations: np.ndarray) -> Any:
        """The action distributions at these observations, or None if the KL of updates is not measured."""

    def kl(self, old: Any, new: Any) -> float:
        """Exact KL(old || new), averaged over the states."""


class Stopwatch:
    """CPU and wall seconds of this process, without those spent while paused."""

    def __init__(self) -> None:
        self._counted = np.zeros(2)
        self._since: np.ndarray | None = self._now()  # None while paused

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()])

    def read(self) -> tuple[float, float]:
        running = 0.0 if self._since is None else self._now() - self._since
        cpu, wall = (self._counted + running).tolist()
        return cpu, wall

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the clock; a pause within a pause has no effect."""
        if self._since is None:
            yield
            return
        self._counted = self._counted + (self._now() - self._since)
        self._since = None
        try:
            yield
        finally:
            self._since = self._now()


class Meter:
    """Measures a run from a callback after each update; `result` gives the content of the result file."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.clock = Stopwatch()
        self.evaluations: list[dict[str, float]] = []
        self.kl_per_update: list[float | None] = []
        self.series: dict[str, list[float | None]] = {name: [] for name in spec.series}
        self.steps = 0
        self._due = spec.eval_every
        self._states: np.ndarray | None = None
        self._before: Any = None

    def after_update(self, steps: int, player: Player, metrics: dict[str, float]) -> None:
        with self.clock.paused():
            self.steps = steps
            for name, values in self.series.items():
                values.append(_finite(metrics.get(name)))
            if self.spec.measure_kl:
                self._measure_kl(player)
            if steps >= self._due:
                self.evaluate(player, self.spec.eval_episodes)
                self._due += self.spec.eval_every * (1 + (steps - self._due) // self.spec.eval_every)
                self._visit(player)

    def evaluate(self, player: Player, episodes: int) -> None:
        with self.clock.paused():
            returns = player.evaluate(episodes, self.spec.seed)
        if self.evaluations and self.evaluations[-1]["steps"] == self.steps:
            self.evaluations.pop()  # of the same policy: the evaluation at the end replaces it, with more episodes
        mean, std = float(returns.mean()), float(returns.std())
        cpu, wall = self.clock.read()
        point = {"steps": self.steps, "cpu_s": cpu, "wall_s": wall, "mean": mean, "std": std, "episodes": episodes}
        self.evaluations.append(point)
        _say(steps=self.steps, mean=mean)

    def result(self, player: Player, last_returns: list[float]) -> dict[str, Any]:
        """Evaluate once more and return the measurements. To be called at the end of training."""
        cpu, wall = self.clock.read()
        peak = peak_memory_bytes()  # read before the evaluation, which may use more environments than training
        self.evaluate(player, self.spec.final_episodes)
        return {
            "evaluations": self.evaluations,
            "steps": self.steps,
            "cpu_s": cpu,
            "wall_s": wall,
            "peak_memory_bytes": peak,
            "kl_per_update": self.kl_per_update,
            "series": self.series,
            "last_returns": last_returns[-LAST_RETURNS:],
        }

    def _measure_kl(self, player: Player) -> None:
        """Record KL(policy before the update || after it), at states that the policy visited recently."""
        if self._states is None:
            self._visit(player)  # the first update is not measured: the policy before it was not seen
            return
        now = player.distribution(self._states)
        if now is not None:
            self.kl_per_update.append(_finite(player.kl(self._before, now)))
        self._before = now

    def _visit(self, player: Player) -> None:
        """Replace the states at which the KL is measured by those that the present policy visits, outside training."""
        if self.spec.measure_kl:
            self._states = probe_states(player, self.spec.seed)
            self._before = player.distribution(self._states)


def probe_states(player: Player, seed: int) -> np.ndarray:
    """States that the policy visits with sampled actions, (256, ...), in environments of their own."""
    envs = [
        make_env(player.env, seed=seed, row=row, purpose=EVALUATION, options=player.options)
        for row in range(PROBE_ENVS)
    ]
    observations = np.stack([each.reset()[0] for each in envs])
    seen = []
    for step in range(PROBE_STEPS):
        if step % PROBE_STRIDE == 0:
            seen.append(observations.copy())
        for row, action in enumerate(player.sample(observations, step)):
            observation, _, terminated, truncated, _ = envs[row].step(action)
            observations[row] = envs[row].reset()[0] if terminated or truncated else observation
    for each in envs:
        each.close()
    return np.concatenate(seen)


def peak_memory_bytes() -> int:
    """Peak memory of this process. Not ru_maxrss on Linux: it includes what the parent held at the start."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if value is not None and np.isfinite(value) else None


def _say(**facts: float) -> None:
    print(json.dumps(facts), flush=True)
