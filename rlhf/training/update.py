"""The update, from a batch with advantages to new weights: epochs x minibatches, the same for every algorithm.

Every process holds the whole batch, and (seed, step, epoch) determine the rows of each minibatch. steppers.py makes the
optimizer steps.
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
    """How one batch is split into optimizer steps. minibatch_size is global: over all processes."""

    num_epochs: int = 4
    """Passes over each batch."""
    minibatch_size: int | None = 64
    """Rows (completions; transitions on control tasks) per optimizer step; the whole batch if null."""
    microbatch_tokens: int = 16_384
    """About how many tokens one process computes at once. Changes memory and speed, and results only by rounding."""
    max_grad_norm: float = 1.0
    """Gradient clipping: the gradient is scaled down to at most this global norm."""
    target_kl: float | None = None
    """Stop the step's remaining updates once KL(old || policy) of a minibatch exceeds 1.5 times this; off if null."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_epochs", "minibatch_size", "microbatch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not self.max_grad_norm > 0 or (self.target_kl is not None and not self.target_kl > 0):
            raise InputError(
                f"max_grad_norm={self.max_grad_norm} and target_kl={self.target_kl} must be above 0; set target_kl to "
                "null to never stop early."
            )


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
    only: str | None = None,
) -> dict[str, float]:
    """Trains `policy` on the global `batch` (equal on all processes).

    Args:
        policy: Called as policy(inputs, actions, with_values=, with_entropy=) -> PolicyOutputs, also with
            old_distribution= if the algorithm needs "distribution".
        stepper: From `make_stepper`, for this policy.
        seed, step: Determine the minibatches.
        state: What the algorithm adapts; changed in place.
        only: Name of the optimizer's group of parameters that alone is trained; None: all are.

    Returns:
        The step's mean metrics, global.

    Raises:
        TrainingError: A gradient is not finite; it is not applied.
    """
    state = {} if state is None else state
    metrics = dict(batch.metrics) | algorithm.full_batch_step(distributed.unwrap(policy), batch, distributed)
    sums = MetricSums()
    steps = 0
    epochs = _epochs(batch, config, seed, step)
    for minibatches in epochs if algorithm.measures_kl == "epoch" else [list(chain.from_iterable(epochs))]:
        outcome = stepper.run(batch, minibatches, sums, only)
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
    """Creates the stepper of a run. Call it once: what the stepper keeps (a compiled graph) serves all updates.

    Args:
        policy, optimizer: As `layout.train` returned them.
        kind: The class of the stepper.
    """
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
    """The minibatches of each epoch, in an order determined by (seed, step, epoch)."""
    size = config.minibatch_size
    if size is None or size >= batch.rows:  # each minibatch is the whole batch; its order does not matter
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
    """Measures KL(old || policy) over the whole batch and lets the algorithm adapt to it."""
    total = batch.old_logprobs.new_zeros(())
    with distributed.layout.inference(distributed.unwrap(policy), gather=False):
        for microbatch in split_minibatch(batch, config.microbatch_tokens, distributed.rank, distributed.world_size):
            outputs = forward(policy, algorithm, microbatch)
            mask = microbatch.weightings["policy"].weight != 0
            kl = outputs.kl
            if kl is None:  # language models have no exact KL: k3 of the old policy's samples
                kl = kl_estimate(microbatch.old_logprobs, outputs.logprobs, "k3")
            total = total + masked_sum(kl, mask)
    measured = (distributed.all_sum(total) / batch.mask.sum()).item()
    batch.coefficients.update(algorithm.adapt(state, measured))
    return {"measured_kl": measured}
