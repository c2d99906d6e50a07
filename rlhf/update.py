"""From a batch of advantages to new weights: epochs x minibatches x microbatches, for every algorithm with a loss.

The optimizer step does not depend on how rows are spread over processes or cut into microbatches: every process holds the
whole batch, membership of a minibatch is a function of (seed, step, epoch), and denominators are those of the minibatch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from rlhf.algorithms import Algorithm, State
from rlhf.core.kl import kl_estimate
from rlhf.core.masking import masked_sum, whiten
from rlhf.core.random import MINIBATCH, permutation
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.metrics import MetricSums
from rlhf.types import PolicyOutputs, TrainingBatch, Weighting


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How one batch becomes optimizer steps. Sizes are global: over all processes."""

    num_epochs: int = 4
    """Passes over each batch."""
    minibatch_size: int | None = 64
    """Rows (completions; transitions on control tasks) per optimizer step; all of them if null."""
    microbatch_tokens: int = 16_384
    """About how many tokens one process holds in memory at once: changes memory and speed, results only by rounding."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global norm."""
    target_kl: float | None = None
    """Stop the step's remaining updates once KL(old || policy) of a minibatch exceeds 1.5 times this; off if null."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "minibatch_size", "microbatch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not self.max_grad_norm > 0 or (self.target_kl is not None and not self.target_kl > 0):
            raise InputError("max_grad_norm and target_kl must be above 0; use target_kl null for no stop.")


def update(
    policy: Module,
    algorithm: Algorithm,
    batch: TrainingBatch,
    optimizer: Optimizer,
    config: UpdateConfig,
    distributed: Distributed,
    *,
    seed: int,
    step: int,
    state: State | None = None,
) -> dict[str, float]:
    """Train `policy` on the global `batch` (equal on all processes); the step's mean metrics, global.

    policy: module called as policy(inputs, actions, with_values=, with_entropy=) -> PolicyOutputs, with
    old_distribution= too if the algorithm needs "distribution". state: what the algorithm adapts, changed in place.
    Raises TrainingError if a gradient is not finite; it is not applied.
    """
    state = {} if state is None else state
    metrics = dict(batch.metrics) | algorithm.full_batch_step(distributed.unwrap(policy), batch, distributed)
    sums = MetricSums()
    optimizer_steps = 0
    for epoch, minibatches in enumerate(_epochs(batch, algorithm.whiten_minibatch, config, seed, step)):
        for minibatch in minibatches:
            optimizer.zero_grad(set_to_none=True)
            kl = _accumulate_gradients(policy, algorithm, minibatch, config.microbatch_tokens, distributed, sums)
            if config.target_kl is not None and distributed.all_sum(kl) > 1.5 * config.target_kl:
                break
            norm = distributed.clip_gradients(policy, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"The gradient of step {step}, epoch {epoch}, optimizer step {optimizer_steps} is not finite; it was "
                    "not applied. Lower learning_rate, or look for a reward or model output of extreme size."
                )
            optimizer.step()
            optimizer_steps += 1
            sums.add({"grad_norm": (norm, norm.new_ones(()))})
        else:  # the epoch was not cut short by target_kl
            if algorithm.measures_kl == "epoch":
                metrics |= _adapt(policy, algorithm, batch, config, distributed, state)
            continue
        break
    optimizer.zero_grad(set_to_none=True)
    if algorithm.measures_kl == "update":
        metrics |= _adapt(policy, algorithm, batch, config, distributed, state)
    return {**metrics, **sums.reduce(distributed.all_sum), "optimizer_steps": float(optimizer_steps)}


def _epochs(
    batch: TrainingBatch, whiten_advantages: bool, config: UpdateConfig, seed: int, step: int
) -> Iterator[Iterator[TrainingBatch]]:
    """The minibatches of each epoch, in an order that (seed, step, epoch) decides."""
    if (
        config.minibatch_size is None or config.minibatch_size >= batch.rows
    ):  # each is the whole batch: made once, its order does not matter
        whole = _minibatch(batch, whiten_advantages)
        yield from (iter([whole]) for _ in range(config.num_epochs))
        return
    orders = permutation(batch.rows, seed, MINIBATCH, step, torch.arange(config.num_epochs)).to(batch.actions.device)
    for order in orders:
        yield (_minibatch(batch.select(rows), whiten_advantages) for rows in order.split(config.minibatch_size))


def _minibatch(minibatch: TrainingBatch, whiten_advantages: bool) -> TrainingBatch:
    """The minibatch with its global denominators; no collective, since every process holds all of it."""
    denominators = {name: w.count.sum().clamp(min=1e-8) for name, w in minibatch.weightings.items()}
    minibatch = replace(minibatch, denominators=denominators)
    if whiten_advantages:
        counts = minibatch.mask & (minibatch.weightings["policy"].weight != 0)
        minibatch = replace(minibatch, advantages=whiten(minibatch.advantages, counts))
    return minibatch


def _accumulate_gradients(
    policy: Module,
    algorithm: Algorithm,
    minibatch: TrainingBatch,
    microbatch_tokens: int,
    distributed: Distributed,
    sums: MetricSums,
) -> Tensor:
    """Add up this process's part of the minibatch's gradient; returns its part of the mean KL(old || policy)."""
    kl = minibatch.old_logprobs.new_zeros(())
    microbatches = split_minibatch(minibatch, microbatch_tokens, distributed.rank, distributed.world_size)
    for number, microbatch in enumerate(microbatches):
        with distributed.accumulate(policy, last=number == len(microbatches) - 1):
            loss, metrics = algorithm.loss(forward(policy, algorithm, microbatch), microbatch)
            distributed.backward(loss)
        sums.add(metrics)
        kl = kl + metrics["policy_kl"][0] / minibatch.mask.sum()
    return kl


def forward(policy: Module, algorithm: Algorithm, batch: TrainingBatch) -> PolicyOutputs:
    """The policy's outputs on a microbatch, as far as the algorithm needs them."""
    needs = algorithm.needs
    old = {"old_distribution": batch.old_distribution} if batch.old_distribution is not None else {}
    return policy(batch.inputs, batch.actions, with_values="values" in needs, with_entropy="entropy" in needs, **old)


@torch.no_grad()
def _adapt(
    policy: Module,
    algorithm: Algorithm,
    batch: TrainingBatch,
    config: UpdateConfig,
    distributed: Distributed,
    state: State,
) -> dict[str, float]:
    """Measure KL(old || policy) over the whole batch and let the algorithm adapt to it."""
    total = batch.old_logprobs.new_zeros(())
    for microbatch in split_minibatch(batch, config.microbatch_tokens, distributed.rank, distributed.world_size):
        outputs, mask = forward(policy, algorithm, microbatch), microbatch.weightings["policy"].weight != 0
        kl = outputs.kl
        if kl is None:  # tokens: no exact one, but k3 of samples of the old policy
            kl = kl_estimate(microbatch.old_logprobs, outputs.logprobs, "k3")
        total = total + masked_sum(kl, mask)
    measured = (distributed.all_sum(total) / batch.mask.sum()).item()
    batch.coefficients.update(algorithm.adapt(state, measured))
    return {"measured_kl": measured}


def split_minibatch(
    minibatch: TrainingBatch, microbatch_tokens: int, rank: int, world_size: int
) -> list[TrainingBatch]:
    """This process's microbatches: its share of the rows, of similar length together, cut to their longest row.

    All processes get the same number, because sharded models exchange weights in every forward; one that has run out of
    rows computes a row of weight 0.
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
        microbatches.append(selected if rows else _weightless(selected))
    return microbatches


def _fill(tokens: list[int], rows: range, limit: int) -> list[list[int]]:
    """Rows sorted by length, in groups whose padded size (rows x longest) keeps to `limit`; a longer row stands alone."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -tokens[row]):
        if groups and (len(groups[-1]) + 1) * tokens[groups[-1][0]] <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _weightless(batch: TrainingBatch) -> TrainingBatch:
    return replace(
        batch, weightings={name: Weighting(w.weight * 0, w.count * 0) for name, w in batch.weightings.items()}
    )
