"""The seam between an algorithm and everything else: `Algorithm` says what is needed of one, with defaults; torch only."""

from typing import Literal, NamedTuple, Protocol

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


class Loss(NamedTuple):
    """What `loss` makes of a microbatch: shares of the minibatch, which add up over microbatches and processes."""

    total: Tensor
    """Scalar, to be differentiated."""
    terms: Metrics
    """name -> (sum, count): the parts of `total`, and what else is to be seen of the update."""
    policy_kl: tuple[Tensor, Tensor]
    """KL(old || policy), estimated: its sum over the elements that learn, and their count. `target_kl` stops by it."""

    @property
    def metrics(self) -> Metrics:
        """Everything that is logged of the microbatch."""
        return {**self.terms, "policy_kl": self.policy_kl}


class Algorithm:
    """An algorithm is what it needs, `prepare` (rewards -> advantages) and `loss`. A new one is one file and its test."""

    needs: frozenset[str] = frozenset()
    """Of "values", "reference", "entropy", "distribution": what must be computed for it."""
    completions_per_prompt: int = 1
    whiten_minibatch: bool = False
    """Advantages are whitened in each minibatch, by `update`, with global statistics."""
    measures_kl: Literal["never", "update", "epoch"] = "never"
    """When `update` measures KL(old || policy) over the whole batch and calls `adapt`: after the last epoch, or each."""

    def initial_state(self) -> State:
        """What adapts, and only that: a setting that stays as it is belongs to the configuration."""
        return {}

    def advantages(self, rewards: Tensor, trajectories: Trajectories, all_sum: AllSum) -> tuple[Tensor, Tensor | None]:
        """(advantages, returns for the value function or None), (rows, time) each; 0 where the mask is False.

        The estimator alone (GAE, group-relative, ...), before any whitening. rewards: (rows, time), what to learn from:
        those of `trajectories` less the penalties that `prepare` takes off.
        """
        raise NotImplementedError

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards -> advantages. `progress` in [0, 1] drives schedules; `state` may be changed."""
        raise NotImplementedError

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Loss:
        """The share of a microbatch in the minibatch's loss: sums over the global denominators in the batch."""
        raise NotImplementedError

    def full_batch_step(self, policy: Module, batch: TrainingBatch, group: Group) -> dict[str, float]:
        """A step that needs the whole batch at once, before the minibatches (TRPO's); its metrics.

        policy: the module itself, not wrapped for several processes; `batch` is the global one.
        """
        return {}

    def adapt(self, state: State, kl: float) -> dict[str, float]:
        """Change `state` after KL(old || policy) was measured (see `measures_kl`); the coefficients that follow from it."""
        return {}
