"""The policy that sampled is the policy that trains: their log-probs of the same actions, compared at every step."""

from dataclasses import dataclass

import torch

from rlhf.core.masking import masked_sum
from rlhf.errors import TrainingError
from rlhf.types import TrainingBatch

SHARE_BEYOND = 0.01
"""Of the actions, how many may lie beyond the bound where sampler and training forward differ by precision."""
MEAN_OF_BOUND = 0.1
"""And how large their mean gap may be, as a part of the bound."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the log-probs that a sampler reports may be from those of the training forward."""

    bound: float
    """Nats between the two log-probs of one action."""
    remedy: str
    """What may be wrong, and what to do: the end of the error."""
    exact: bool = True
    """They differ by rounding alone, so that no action may lie beyond the bound. Otherwise by precision: then rare ones
    may, since one token in a million must not end a long run, and the mean is held to a tenth of the bound."""


def check_sampler(batch: TrainingBatch, agreement: Agreement, version: int) -> dict[str, float]:
    """The gap between sampling and training log-probs (largest, mean), and the policy's entropy as its samples show it.

    Actions that an older version of the policy sampled are left out: these weights did not draw them. TrainingError if the
    others are not this policy's; nothing was learnt from the step then.
    """
    entropy = -masked_sum(batch.old_logprobs, batch.mask) / batch.mask.sum()
    current = batch.mask if batch.policy_version is None else batch.mask & (batch.policy_version == version)
    gaps = torch.where(current, batch.sampling_logprobs - batch.old_logprobs, 0.0).abs()
    count = int(current.sum())
    metrics = {"entropy": entropy.item()}
    if count == 0:
        return metrics
    largest, mean = gaps.max().item(), (gaps.sum() / count).item()
    beyond = int((~(gaps < agreement.bound)).sum())  # also those that are no numbers
    wrong = beyond > 0 if agreement.exact else beyond > max(1, SHARE_BEYOND * count)
    if wrong or not (agreement.exact or mean < MEAN_OF_BOUND * agreement.bound):
        raise TrainingError(
            f"Sampling and training log-probs of the same action differ by up to {largest:.3g} nats in step {version} "
            f"({mean:.3g} on average, {beyond} of {count} by more than {agreement.bound:g}): they are not the same policy. "
            f"Nothing was trained in this step. {agreement.remedy}"
        )
    return metrics | {"sampler_gap": largest, "sampler_gap_mean": mean}
