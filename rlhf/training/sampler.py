"""Checks in every step that the policy that sampled is the one that trains, by their log-probs of the same actions."""

from dataclasses import dataclass

import torch

from rlhf.core.masking import masked_sum
from rlhf.errors import TrainingError
from rlhf.types import TrainingBatch

SHARE_BEYOND = 0.01
"""Largest share of actions that may lie beyond the bound if sampler and training forward differ in precision."""
MEAN_OF_BOUND = 0.1
"""Limit on the mean gap in the same case, as a fraction of the bound."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the log-probs that a sampler reports may be from those of the training forward."""

    bound: float
    """Largest difference between the two log-probs of one action, in nats."""
    remedy: str
    """End of the error message: what may be wrong, and what to do."""
    exact: bool = True
    """True: the log-probs differ by rounding alone, and no action may lie beyond the bound. False: they differ in
    precision; rare actions may lie beyond the bound, since one token in a million must not end a long run, but the mean
    gap must stay below a tenth of it."""


def check_sampler(batch: TrainingBatch, agreement: Agreement, version: int) -> dict[str, float]:
    """The gap between sampling and training log-probs (largest, mean), and the policy's entropy estimated from samples.

    The gap leaves out actions that an older version of the policy sampled. Raises TrainingError, before anything is
    learnt from the step, if the others were not sampled by this policy.
    """
    if batch.policy_version is not None and bool((batch.mask & (batch.policy_version > version)).any()):
        newest = int(batch.policy_version[batch.mask].max())
        raise TrainingError(
            f"Tokens of step {version} are said to be sampled after {newest} updates. Check the engine."
        )
    entropy = -masked_sum(batch.old_logprobs, batch.mask) / batch.mask.sum()
    current = batch.mask if batch.policy_version is None else batch.mask & (batch.policy_version == version)
    gaps = torch.where(current, batch.sampling_logprobs - batch.old_logprobs, 0.0).abs()
    count = int(current.sum())
    metrics = {"entropy": entropy.item()}
    if count < int(batch.mask.sum()):
        metrics["stale_fraction"] = 1.0 - count / int(batch.mask.sum())
    if count == 0:
        return metrics
    largest, mean = gaps.max().item(), (gaps.sum() / count).item()
    beyond = int((~(gaps < agreement.bound)).sum())  # counts NaN, too
    wrong = beyond > 0 if agreement.exact else beyond > max(1, SHARE_BEYOND * count)
    if wrong or not (agreement.exact or mean < MEAN_OF_BOUND * agreement.bound):
        raise TrainingError(
            f"Sampling and training log-probs of the same action differ by up to {largest:.3g} nats in step {version} "
            f"({mean:.3g} on average, {beyond} of {count} by more than {agreement.bound:g}): sampler and learner "
            f"are not the same policy. Nothing was trained in this step. {agreement.remedy}"
        )
    return metrics | {"sampler_gap": largest, "sampler_gap_mean": mean}
