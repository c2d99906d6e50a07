"""The steps of an update: a minibatch of rows -> one optimizer step, microbatch by microbatch, on one or many processes.

The optimizer step does not depend on how rows are spread over processes or cut into microbatches: every process holds the
whole batch, and denominators are those of the minibatch.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isfinite
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from rlhf.algorithms import Algorithm
from rlhf.core.masking import whiten
from rlhf.distributed import Distributed
from rlhf.metrics import MetricSums
from rlhf.types import PolicyOutputs, TrainingBatch, Weighting

Minibatch = Tensor | None
"""The rows of a minibatch, int64; None for all of the batch."""


class Outcome(NamedTuple):
    """How many optimizer steps were made, and why not all, if so. The step that stopped was not made."""

    steps: int
    stopped_by: Literal["target_kl", "gradient"] | None = None


class Stepper(Protocol):
    """Makes the optimizer steps of a run; made once for it by `rlhf.update.make_stepper`."""

    def run(self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums) -> Outcome:
        """One step per minibatch until target_kl or a gradient that is not finite stops it; metrics go to `sums`."""
        ...


class EagerStepper:
    """Steps made operation by operation: for every model, optimizer and number of processes."""

    def __init__(
        self,
        policy: Module,
        algorithm: Algorithm,
        optimizer: Optimizer,
        distributed: Distributed,
        *,
        max_grad_norm: float,
        target_kl: float | None,
        microbatch_tokens: int,
    ) -> None:
        self.policy, self.algorithm, self.optimizer, self.distributed = policy, algorithm, optimizer, distributed
        self.max_grad_norm, self.target_kl, self.microbatch_tokens = max_grad_norm, target_kl, microbatch_tokens
        self.parameters = list(policy.parameters())

    def run(self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums) -> Outcome:
        whole = one = None
        steps = 0
        for rows in minibatches:
            if rows is None:  # the same every time, so it is prepared once
                minibatch = whole = whole or prepare_minibatch(batch, self.algorithm.whiten_minibatch)
            else:
                minibatch = prepare_minibatch(batch.select(rows), self.algorithm.whiten_minibatch)
            self._clear()
            kl = self._accumulate(minibatch, sums)
            if self.target_kl is not None and self.distributed.all_sum(kl) > 1.5 * self.target_kl:
                return self._ended(steps, "target_kl")
            norm = self._clip()
            if not isfinite(norm.item()):
                return self._ended(steps, "gradient")
            self.optimizer.step()
            one = norm.new_ones(()) if one is None else one
            sums.add({"grad_norm": (norm, one)})
            steps += 1
        return self._ended(steps)

    def _ended(self, steps: int, stopped_by: Literal["target_kl", "gradient"] | None = None) -> Outcome:
        self._clear()  # the gradients' memory
        return Outcome(steps, stopped_by)
