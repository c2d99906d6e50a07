"""The policy that sampled is the policy that trains: their log-probs of the same actions, compared."""

from dataclasses import dataclass

import torch

from rlhf.core.masking import masked_sum
from rlhf.errors import TrainingError
from rlhf.types import TrainingBatch


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the log-probs that a sampler reports may be from those of the training forward."""

    bound: float
    """Nats between the two log-probs of one action beyond which they are not the same policy."""
    remedy: str
    """What may be wrong, and what to do: the end of the error."""
    first_only: bool = False
    """Compare in the first step alone: later ones hold actions of older weights."""


def check_sampler(batch: TrainingBatch, agreement: Agreement, step: int) -> dict[str, float]:
    """The largest gap between sampling and training log-probs, and the policy's entropy as its samples show it.

    TrainingError if they are not those of one policy; nothing was learnt from the step then.
    """
    entropy = -masked_sum(batch.old_logprobs, batch.mask) / batch.mask.sum()
    metrics = {"entropy": entropy.item()}
    if agreement.first_only and step > 0:
        return metrics
    gap = torch.where(batch.mask, batch.sampling_logprobs - batch.old_logprobs, 0.0).abs().max().item()
    if not gap < agreement.bound:
        raise TrainingError(
            f"Sampling and training log-probs of the same action differ by up to {gap:.3g} nats in step {step} (limit "
            f"{agreement.bound:g}): they are not the same policy. Nothing was trained in this step. {agreement.remedy}"
        )
    return metrics | {"sampler_gap": gap}
