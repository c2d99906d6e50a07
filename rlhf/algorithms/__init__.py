"""What an algorithm is: settings, `prepare` (trajectories -> advantages) and `loss`. One file each; torch only."""

from typing import Protocol

from torch import Tensor

from rlhf.core.masking import AllSum
from rlhf.types import Metrics, PolicyOutputs, TrainingBatch, Trajectories

State = dict[str, float]
"""What adapts during a run, such as a KL coefficient; saved in every checkpoint."""


class Algorithm(Protocol):
    """The seam between an algorithm and the loops: an algorithm declares what it needs and implements two methods."""

    needs: frozenset[str]
    """Of "values", "reference", "entropy": what must be computed for it."""
    completions_per_prompt: int
    whiten_minibatch: bool
    """Advantages are whitened in each minibatch, by `update`, with global statistics."""

    def initial_state(self) -> State: ...

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards -> advantages. `progress` in [0, 1] drives schedules; `state` may be changed."""
        ...

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> tuple[Tensor, Metrics]:
        """The share of a microbatch in the minibatch's loss: sums over the global denominators in the batch."""
        ...
