"""From a batch of advantages to new weights: epochs x minibatches, for every algorithm with a loss.

Every process holds the whole batch, and membership of a minibatch is a function of (seed, step, epoch).
The steps themselves are made by steppers.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn import Module
from torch.optim import Optimizer

from rlhf.algorithms.base import Algorithm, State
from rlhf.core.kl import kl_estimate
from rlhf.core.masking import masked_sum
from rlhf.core.random import MINIBATCH, permutation
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.settings import check_types
from rlhf.training.steppers import EagerStepper, Minibatch, Stepper, forward, split_minibatch
from rlhf.training.sums import MetricSums
from rlhf.types import TrainingBatch


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
        check_types(self)
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
    stepper: Stepper,
    config: UpdateConfig,
    distributed: Distributed,
    *,
    seed: int,
    step: int,
    state: State | None = None,
) -> dict[str, float]:
    """Train `policy` on the global `batch` (equal on all processes); the step's mean metrics, global.

    policy: module called as policy(inputs, actions, with_values=, with_entropy=) -> PolicyOutputs, with
    old_distribution= too if the algorithm needs "distribution". stepper: from make_stepper, for this policy. state: what
    the algorithm adapts, changed in place.
    Raises TrainingError if a gradient is not finite; it is not applied.
    """
    state = {} if state is None else state
    metrics = dict(batch.metrics) | algorithm.full_batch_step(distributed.unwrap(policy), batch, distributed)
    sums, steps = MetricSums(), 0
    epochs = _epochs(batch, config, seed, step)
    for minibatches in epochs if algorithm.measures_kl == "epoch" else [list(chain.from_iterable(epochs))]:
        outcome = stepper.run(batch, minibatches, sums)
        steps += outcome.steps
        if outcome.stopped_by == "gradient":
            raise TrainingError(
                f"The gradient of step {step}, optimizer step {steps} is not finite; it was not applied. Lower "
                "learning_rate, or look for a reward or model output of extreme size."
            )
        if algorithm.measures_kl == "update" or (algorithm.measures_kl == "epoch" and outcome.stopped_by is None):
            metrics |= _adapt(policy, algorithm, batch, config, distributed, state)
        if outcome.stopped_by is not None:
            break
    return {**metrics, **sums.reduce(distributed.all_sum), "optimizer_steps": float(steps)}


def make_stepper(
    policy: Module,
    algorithm: Algorithm,
    optimizer: Optimizer,
    config: UpdateConfig,
    distributed: Distributed,
    kind: Callable[..., Stepper] = EagerStepper,
) -> Stepper:
    """What makes the optimizer steps of a run. Make it once: what it keeps (a compiled graph) serves all updates."""
    return kind(
        policy,
        algorithm,
        optimizer,
        distributed,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        microbatch_tokens=config.microbatch_tokens,
    )


def _epochs(batch: TrainingBatch, config: UpdateConfig, seed: int, step: int) -> list[Sequence[Minibatch]]:
    """The minibatches of each epoch, in an order that (seed, step, epoch) decides."""
    size = config.minibatch_size
    if size is None or size >= batch.rows:  # each is the whole batch, whose order does not matter
        return [[None]] * config.num_epochs
    orders = permutation(batch.rows, seed, MINIBATCH, step, torch.arange(config.num_epochs))
    return [order.split(size) for order in orders.to(batch.actions.device)]


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
