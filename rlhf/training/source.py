"""The interface between the learner and the sources of its trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol

from rlhf.errors import InputError, excerpt
from rlhf.runs.checkpoint import Part
from rlhf.runs.jsonlines import encoded
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


def check_samples(collected: Collected) -> None:
    """Raise InputError, before the step is learnt from, if a line for completions.jsonl could not be written after it."""
    rows = set(collected.trajectories.row_index.tolist())
    for sample in collected.samples:
        try:
            encoded(0, sample)
            row = sample.get("row")
            fits = isinstance(row, Integral) and row in rows
            problem = None if fits else f'its "row" {excerpt(row)} is not among those of the trajectories'
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise InputError(
                f"source: the sample {excerpt(sample)} cannot be written to completions.jsonl: {problem}. Give mappings of "
                "text, numbers and lists. Nothing was trained in this step."
            )
