"""Elementwise losses, minimised; `weighted_sum` in masking.py reduces them. All tensors are (rows, time).

Elements where `mask` is False have ratio 1 and no gradient. The log-ratio is masked *before* exp: masking an inf after
exp would give a finite loss with a NaN gradient.
"""

import torch
from torch import Tensor

from rlhf.core.kl import MAX_LOG_RATIO


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old) where `mask`, else 0; clamped to +-20 so that exp stays finite."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped policy loss: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_old.

    Schulman et al. 2017, eq. 7 (arXiv 1707.06347). Does not normalise advantages and does not reduce.

    Args:
        clip_low, clip_high: Unequal bounds are DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: c > 1 bounds the loss of a negative advantage by -c A, however large r grows (Ye et al. 2020,
            arXiv 1912.09729).
    """
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.max(objective, dual_clip * advantages), objective)
    return -objective


def unclipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-r A, the surrogate without a clip: TRPO's objective (arXiv 1502.05477). Nothing limits an update."""
    return -log_ratio(logprobs, old_logprobs, mask).exp() * advantages


def clipped_weight_surrogate(
    logprobs: Tensor, log_ratios: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi, sg = stop-gradient: a clipped token keeps its gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585, eqs. 4-5).

    Args:
        log_ratios: log r, from `log_ratio` or `sequence_log_ratio`.
        clip_low: 1 or more: no lower bound.
    """
    weight = log_ratios.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * torch.where(mask, logprobs, 0.0)


def sequence_log_ratio(log_ratios: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    """Log-ratio of each whole completion, (rows, time) -> (rows, time), the same for all tokens of a row.

    mean: True divides by the completion's length, for GSPO's geometric mean (arXiv 2507.18071, eq. 7); False gives the
    sum, the log of the completion's importance weight. `log_ratios` must be 0 where `mask` is False.
    """
    total = log_ratios.sum(-1, keepdim=True)
    total = total / mask.sum(-1, keepdim=True).clamp(min=1) if mean else total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(mask, total, 0.0)


def score_surrogate(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-log pi A, whose gradient is the policy gradient (Williams 1992, REINFORCE; A2C): no ratio to the old policy."""
    return -torch.where(mask, logprobs, 0.0) * advantages


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float | None
) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -range, range) - R)^2); 0.5 (V - R)^2 if the range is None.

    From OpenAI's baselines (not in the PPO paper). The max makes the loss pessimistic: the gradient vanishes only where
    V left the band *towards* R.

    Args:
        old_values: V_old, before the update.
        returns: R.
        value_clip_range: In units of the reward, so that it depends on the reward's scale.
    """
    error = torch.where(mask, values - returns, 0.0) ** 2
    if value_clip_range is None:
        return 0.5 * error
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return 0.5 * torch.max(error, torch.where(mask, near - returns, 0.0) ** 2)


def clipped_elements(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the clip stops the gradient, two bool tensors: A < 0 and r < 1 - clip_low; A > 0 and r > 1 + clip_high."""
    return (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)
