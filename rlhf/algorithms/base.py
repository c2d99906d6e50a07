"""What an algorithm is: settings, `prepare` (trajectories -> advantages) and `loss`. One file each; torch only."""

from typing import Literal, Protocol

from torch import Tensor
from torch.nn import Module

from rlhf.core.masking import AllSum
from rlhf.types import Metrics, PolicyOutputs, TrainingBatch, Trajectories

State = dict[str, float]
"""What adapts during a run, such as a KL coefficient; saved in every checkpoint."""


class Group(Protocol):
    """The processes that train together, as an algorithm sees them; `rlhf.distributed.Distributed` is one."""

    rank: int
    world_size: int

    def all_sum(self, values: Tensor) -> Tensor: ...


class Algorithm(Protocol):
    """The seam between an algorithm and the loops: an algorithm declares what it needs and implements two methods."""

    needs: frozenset[str]
    """Of "values", "reference", "entropy", "distribution": what must be computed for it."""
    completions_per_prompt: int
    whiten_minibatch: bool
    """Advantages are whitened in each minibatch, by `update`, with global statistics."""

    measures_kl: Literal["never", "update", "epoch"]
    """When `update` measures KL(old || policy) over the whole batch and calls `adapt`: after the last epoch, or each."""

    def initial_state(self) -> State: ...

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards -> advantages. `progress` in [0, 1] drives schedules; `state` may be changed."""
        ...

    def full_batch_step(self, policy: Module, batch: TrainingBatch, group: Group) -> dict[str, float]:
        """A step that needs the whole batch at once, before the minibatches: TRPO's. The others have none and return {}.

        policy: the module itself, not wrapped for several processes; `batch` is the global one.
        """
        ...

    def adapt(self, state: State, kl: float) -> dict[str, float]:
        """Change `state` after KL(old || policy) was measured (see `measures_kl`); the coefficients that follow from it."""
        ...

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> tuple[Tensor, Metrics]:
        """The share of a microbatch in the minibatch's loss: sums over the global denominators in the batch."""
        ...
