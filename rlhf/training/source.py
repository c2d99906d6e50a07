"""The interface between the learner and the sources of its trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.runs.checkpoint import Part
from rlhf.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one process collected in a step."""

    trajectories: Trajectories
    metrics: Mapping[str, float]
    """Metrics of the rollout before the update, global."""
    samples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The first rows, lines of completions.jsonl for people to read. "row" is the row's place in the global batch."""


class Source(Part, Protocol):
    """Collects the trajectories of one step after another, from prompts and an engine, from environments, or by
    wrapping another source. Every process has one and collects its share. `state(step)` is its state before it
    collected `step`, or None if it cannot return there."""

    def collect(self, step: int) -> Collected:
        """The trajectories of step `step`, sampled by the current policy unless `policy_version` says otherwise."""
        ...
