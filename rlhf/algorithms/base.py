"""The interface between an algorithm and the training loop: `Algorithm` has the methods, with defaults; torch only."""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor
from torch.nn import Module

from rlhf.core.masking import AllSum
from rlhf.types import Metrics, PolicyOutputs, TrainingBatch, Trajectories

State = dict[str, float]
"""Values that adapt during a run, such as a KL coefficient; saved in every checkpoint."""


class Group(Protocol):
    """The processes that train together, as an algorithm sees them; implemented by `rlhf.distributed.Distributed`."""

    rank: int
    world_size: int

    def all_sum(self, values: Tensor) -> Tensor: ...


class Loss(NamedTuple):
    """Loss of a microbatch, as shares of the minibatch's loss that add up over microbatches and processes."""

    total: Tensor
    """Scalar, to be differentiated."""
    terms: Metrics
    """name -> (sum, count): the parts of `total` and other metrics of the update."""
    policy_kl: tuple[Tensor, Tensor]
    """Estimate of KL(old || policy), compared with `target_kl`: sum over the elements that learn, and their count."""

    @property
    def metrics(self) -> Metrics:
        """All logged metrics of the microbatch."""
        return {**self.terms, "policy_kl": self.policy_kl}


class Algorithm:
    """An algorithm: `needs`, `prepare` (rewards -> advantages) and `loss`. A new one is one file and its test."""

    needs: frozenset[str] = frozenset()
    """What must be computed for the algorithm: any of "values", "reference", "entropy", "distribution"."""
    completions_per_prompt: int = 1
    whiten_minibatch: bool = False
    """Whether `update` whitens the advantages of each minibatch, with global statistics."""
    measures_kl: Literal["never", "update", "epoch"] = "never"
    """When `update` measures KL(old || policy) over the whole batch and calls `adapt`: "update": after the last epoch;
    "epoch": after each epoch."""

    def initial_state(self) -> State:
        """The values that adapt, and only those: a fixed setting belongs to the configuration."""
        return {}

    def advantages(self, rewards: Tensor, trajectories: Trajectories, all_sum: AllSum) -> tuple[Tensor, Tensor | None]:
        """(advantages, returns for the value function or None), (rows, time) each; 0 where the mask is False.

        The result of the estimator (GAE, group-relative, ...), before any whitening. rewards: (rows, time), those of
        `trajectories` minus the penalties that `prepare` subtracts.
        """
        raise NotImplementedError

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards -> advantages. `progress` in [0, 1] drives schedules; `state` may be changed."""
        raise NotImplementedError

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Loss:
        """A microbatch's share of the minibatch's loss: sums divided by the global denominators in the batch."""
        raise NotImplementedError

    def full_batch_step(self, policy: Module, batch: TrainingBatch, group: Group) -> dict[str, float]:
        """Makes a step that needs the whole batch at once, before the minibatches (TRPO's); returns its metrics.

        policy: the module itself, without the wrapper for several processes. batch: the global one.
        """
        return {}

    def adapt(self, state: State, kl: float) -> dict[str, float]:
        """Changes `state` after KL(old || policy) was measured (see `measures_kl`); returns the new coefficients."""
        return {}
