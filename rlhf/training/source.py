"""Where trajectories come from: the port between whoever collects and the learner."""

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
    """Global numbers that show before anything is learnt."""
    samples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The first rows, for people to read: lines of completions.jsonl. "row" is the row's place in the global batch."""


class Source(Part, Protocol):
    """Collects one step's trajectories after the other: prompts and an engine, environments, or a wrapper of another
    source. Every process has one and collects its share. Its `state(step)` is what it was before it collected `step`, or
    None if it cannot go back there."""

    def collect(self, step: int) -> Collected:
        """The trajectories of step `step`, sampled by the policy as it is now unless they say otherwise."""
        ...
