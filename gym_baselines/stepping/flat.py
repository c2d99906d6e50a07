"""Optimizer steps on flat vectors, for small networks, where launching operations costs more than computing."""

from collections.abc import Iterable
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gym_baselines.stepping.flat_optimizer import FlatOptimizer, obstacle
from rlhf.core.trust_region import flatten
from rlhf.training.steppers import EagerStepper, Minibatch, Outcome, trained_parameters
from rlhf.training.sums import MetricSums
from rlhf.types import TrainingBatch


class FlatStepper(EagerStepper):
    """EagerStepper with the optimizer's arithmetic on flat vectors, if one process and the optimizer allow it."""

    def __init__(self, *parts: Any, flat_up_to: int = 1_000_000, **settings: Any) -> None:
        """flat_up_to: largest number of parameters of a model that is stepped as one vector."""
        super().__init__(*parts, **settings)
        small = sum(p.numel() for p in self.parameters) <= flat_up_to
        self._may_be_flat = self._alone and small and obstacle(self.optimizer) is None
        self._flat: FlatOptimizer | None = None  # made with the first batch, which shows what gets a gradient

    def run(
        self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums, only: str | None = None
    ) -> Outcome:
        if self._flat is None and self._may_be_flat:
            trained = trained_parameters(self.policy, self.algorithm, batch)
            self._flat = FlatOptimizer(list(trained.values()), self.optimizer)
        if self._flat is None or not self._flat.load():
            return super().run(batch, minibatches, sums, only)
        try:
            return self._run(batch, minibatches, sums, partial(self._step_flat, self._flat))
        finally:
            self._clear_gradients()
            self._flat.store()

    def _step_flat(self, flat: FlatOptimizer) -> dict[str, Tensor]:
        """Clip the gradient and apply it, if it is finite; returns its norm before clipping, by its metric's name."""
        gradient = flatten([p.grad for p in flat.parameters])  # type: ignore[misc]
        norm = torch.linalg.vector_norm(gradient)
        factor = self.max_grad_norm / (float(norm) + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if isfinite(norm):
            flat.step(gradient * factor if factor < 1 else gradient)
        return {"grad_norm": norm}
