"""Optimizer steps: a minibatch of rows -> gradients, microbatch by microbatch, on one or many processes.

An optimizer step does not depend on how rows are spread over processes or cut into microbatches: every process holds
the whole batch, and denominators are those of the whole minibatch.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from rlhf.algorithms.base import Algorithm
from rlhf.core.masking import whiten
from rlhf.distributed import Distributed
from rlhf.layout import clip_gradient, gradient_norm
from rlhf.training.sums import MetricSums
from rlhf.types import PolicyOutputs, TrainingBatch, Weighting

Minibatch = Tensor | None
"""The rows of a minibatch, (rows,) int64; None for the whole batch."""
StopReason = Literal["target_kl", "gradient"]


class Outcome(NamedTuple):
    """Number of optimizer steps made, and why the next one was not; `stopped_by` is None if no minibatch was left."""

    steps: int
    stopped_by: StopReason | None = None


class Stepper(Protocol):
    """Makes the optimizer steps of a run, with its model, algorithm and optimizer; created once."""

    def run(
        self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums, only: str | None = None
    ) -> Outcome:
        """Makes one step per minibatch; stops before one with a KL above the target or a gradient that is not finite.

        only: name of the optimizer's group of parameters that is stepped; the others keep weights and moments.
        Adds metrics to `sums`. Afterwards the policy's parameters and the optimizer's state are those of the last step
        made, whatever copies the stepper keeps.
        """
        ...


class EagerStepper:
    """Runs operation by operation, without compilation: for every model, optimizer and number of processes."""

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
        """Keeps what every step needs.

        Args:
            policy, optimizer: As `layout.train` returned them. A group of the optimizer's parameters that has a
                "max_grad_norm" of its own is clipped by itself.
            max_grad_norm, target_kl, microbatch_tokens: The settings of `UpdateConfig`.
        """
        self.policy = policy
        self.algorithm = algorithm
        self.optimizer = optimizer
        self.distributed = distributed
        self.max_grad_norm = max_grad_norm
        self.target_kl = target_kl
        self.microbatch_tokens = microbatch_tokens
        self.parameters = list(policy.parameters())  # listing them in each step would take as long as clipping
        self._clipped = _clipped_groups(self.parameters, optimizer, max_grad_norm)
        self._alone = distributed.world_size == 1 and distributed.strategy == "NO"  # gradients are in the parameters

    def run(
        self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums, only: str | None = None
    ) -> Outcome:
        try:
            return self._run(batch, minibatches, sums, partial(self._step, only))
        finally:
            self._clear_gradients()  # frees their memory

    def _run(
        self,
        batch: TrainingBatch,
        minibatches: Iterable[Minibatch],
        sums: MetricSums,
        make_step: Callable[[], dict[str, Tensor]],
    ) -> Outcome:
        whiten_advantages = self.algorithm.whiten_minibatch
        whole: TrainingBatch | None = None
        one = batch.old_logprobs.new_ones(())
        steps = 0
        for rows in minibatches:
            if rows is not None:
                minibatch = prepare_minibatch(batch.select(rows), whiten_advantages)
            else:  # the same every time, so it is made once
                minibatch = whole = whole or prepare_minibatch(batch, whiten_advantages)
            self._clear_gradients()
            kl = self._accumulate_gradients(minibatch, sums)
            if kl is not None and self.distributed.all_sum(kl) > 1.5 * self.target_kl:  # type: ignore[operator]
                return Outcome(steps, "target_kl")
            norms = make_step()
            if not all(map(isfinite, norms.values())):
                return Outcome(steps, "gradient")
            steps += 1
            sums.add({name: (norm, one) for name, norm in norms.items()})
        return Outcome(steps)

    def _accumulate_gradients(self, minibatch: TrainingBatch, sums: MetricSums) -> Tensor | None:
        """Adds up this process's part of the minibatch's gradient.

        Returns its part of the mean KL(old || policy), or None without a `target_kl`.
        """
        group = self.distributed
        layout = group.layout
        kl = None if self.target_kl is None else minibatch.old_logprobs.new_zeros(())
        microbatches = split_minibatch(minibatch, self.microbatch_tokens, group.rank, group.world_size)
        for number, microbatch in enumerate(microbatches):
            with layout.accumulate(self.policy, last=number == len(microbatches) - 1):
                loss = self.algorithm.loss(forward(self.policy, self.algorithm, microbatch), microbatch)
                layout.backward(loss.total)
            sums.add(loss.metrics)
            if kl is not None:
                kl = kl + loss.policy_kl[0] / minibatch.mask.sum()
        return kl

    def _step(self, only: str | None = None) -> dict[str, Tensor]:
        """Clips the gradients and applies them, if they are finite; returns their norms before clipping."""
        for group in self.optimizer.param_groups if only is not None else ():
            for parameter in group["params"] if group["name"] != only else ():
                parameter.grad = None  # the optimizer skips it: with a gradient of 0, its moments would change
        norms = {name: gradient_norm(parameters) for name, (parameters, _) in self._clipped.items()}
        if all(map(isfinite, norms.values())):
            for name, (parameters, max_norm) in self._clipped.items():
                clip_gradient(parameters, max_norm, norms[name])
            self.optimizer.step()
        return norms

    def _clear_gradients(self) -> None:
        if self._alone:
            for parameter in self.parameters:
                parameter.grad = None
        else:
            self.optimizer.zero_grad(set_to_none=True)


def _clipped_groups(
    parameters: list[Parameter], optimizer: Optimizer, max_grad_norm: float
) -> dict[str, tuple[list[Parameter], float]]:
    """Metric name -> parameters whose gradients are clipped together, and their largest norm."""
    apart = {group["name"]: group for group in optimizer.param_groups if group.get("max_grad_norm") is not None}
    taken = {id(parameter) for group in apart.values() for parameter in group["params"]}
    groups = {"grad_norm": ([p for p in parameters if id(p) not in taken], max_grad_norm)}
    return groups | {f"{name}_grad_norm": (group["params"], group["max_grad_norm"]) for name, group in apart.items()}


def trained_parameters(policy: Module, algorithm: Algorithm, batch: TrainingBatch) -> dict[str, Parameter]:
    """The parameters that get a gradient from the loss, by name. TRPO's loss gives none to the policy's parameters."""
    minibatch = prepare_minibatch(batch.select(slice(0, 1)), whiten_advantages=False)
    candidates = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = algorithm.loss(forward(policy, algorithm, minibatch), minibatch).total
        gradients = torch.autograd.grad(loss, list(candidates.values()), allow_unused=True)
    given = zip(candidates.items(), gradients, strict=True)
    return {name: parameter for (name, parameter), gradient in given if gradient is not None}


def prepare_minibatch(minibatch: TrainingBatch, whiten_advantages: bool) -> TrainingBatch:
    """The minibatch with its global denominators; needs no collective, since every process holds all of it."""
    made: dict[int, Tensor] = {}  # terms often share one count
    for weighting in minibatch.weightings.values():
        if id(weighting.count) not in made:
            made[id(weighting.count)] = weighting.count.sum().clamp(min=1e-8)
    denominators = {name: made[id(weighting.count)] for name, weighting in minibatch.weightings.items()}
    if not whiten_advantages:
        return replace(minibatch, denominators=denominators)
    counts = minibatch.mask & (minibatch.weightings["policy"].weight != 0)
    return replace(minibatch, denominators=denominators, advantages=whiten(minibatch.advantages, counts))


def forward(policy: Callable[..., PolicyOutputs], algorithm: Algorithm, batch: TrainingBatch) -> PolicyOutputs:
    """The policy's outputs on a microbatch, only those that the algorithm needs."""
    needs = algorithm.needs
    old = {"old_distribution": batch.old_distribution} if batch.old_distribution is not None else {}
    return policy(batch.inputs, batch.actions, with_values="values" in needs, with_entropy="entropy" in needs, **old)


def split_minibatch(
    minibatch: TrainingBatch, microbatch_tokens: int, rank: int, world_size: int
) -> list[TrainingBatch]:
    """This process's microbatches: its share of the rows, grouped by similar length, each cut to its longest row.

    All processes get the same number of microbatches, so that each takes part in every exchange between processes; one
    that has run out of rows computes a row of weight 0.
    """
    if world_size == 1 and minibatch.actions.shape[1] == 1 and minibatch.rows <= microbatch_tokens:
        return [minibatch]  # control tasks: nothing to sort, nothing to cut
    tokens = minibatch.row_tokens.tolist()
    shares = [_fill(tokens, range(r, minibatch.rows, world_size), microbatch_tokens) for r in range(world_size)]
    count = max(len(share) for share in shares)
    microbatches = []
    for rows in shares[rank] + [[]] * (count - len(shares[rank])):
        selected = minibatch.select(torch.tensor(rows or [0], device=minibatch.mask.device))
        used = selected.mask.any(0).nonzero()
        selected = selected.select(slice(None), time=int(used.max()) + 1 if len(used) else 1)
        microbatches.append(selected if rows else weightless(selected))
    return microbatches


def _fill(tokens: list[int], rows: range, limit: int) -> list[list[int]]:
    """Groups of rows sorted by length, whose padded size (rows x longest) is at most `limit`; a longer row is alone."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -tokens[row]):
        if groups and (len(groups[-1]) + 1) * tokens[groups[-1][0]] <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def values_only(batch: TrainingBatch) -> TrainingBatch:
    """The batch with weight 0 in every loss term but the value function's."""
    return replace(batch, weightings=weightless(batch).weightings | {"value": batch.weightings["value"]})


def weightless(batch: TrainingBatch) -> TrainingBatch:
    """The batch with weight 0 in every loss term."""
    return replace(
        batch, weightings={name: Weighting(w.weight * 0, w.count * 0) for name, w in batch.weightings.items()}
    )
