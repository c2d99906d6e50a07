"""Advantage estimators: GAE, advantages relative to a group, return-to-go."""

from typing import Literal

import torch
from torch import Tensor

from rlhf.core.masking import AllSum, local_sum

EQUAL = 1e-6
"""Scores of a group count as equal if they differ by at most this times the largest absolute score (at least 1): a
rounding difference is not a preference."""


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    episode_ends: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma * (1 - terminated_t) * next_values_t - values_t
        A_t     = delta_t + gamma * gae_lambda * (1 - episode_ends_t) * A_{t+1},     R_t = A_t + values_t

    Elements where `mask` is False get 0. Within an episode the recursion passes over them; a masked element that ends
    an episode still cuts the recursion.

    Args:
        next_values: Value of the state that actually follows t: of the final observation at a time limit, of the next
            *valid* token across masked tokens.
        terminated: The state after t has no future: cuts the bootstrap.
        episode_ends: The episode ends at t (terminated, truncated or both), and another one follows in the row: cuts
            the recursion.
        mask: False for padding, tool tokens and ghost steps.

    Returns:
        Advantages and returns, (rows, time) each.
    """
    bootstrap = torch.where(terminated, 0.0, gamma * next_values)
    deltas = torch.where(mask, rewards + bootstrap - values, 0.0)
    goes_on = (~episode_ends).to(values.dtype)
    decay = torch.where(mask, gamma * gae_lambda * goes_on, goes_on)  # masked elements pass on what follows
    following = torch.zeros_like(values[:, 0])
    backwards = []
    for delta, factor in zip(reversed(deltas.unbind(1)), reversed(decay.unbind(1)), strict=True):
        following = torch.addcmul(delta, factor, following)
        backwards.append(following)
    advantages = torch.where(mask, torch.stack(backwards[::-1], dim=1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(
    scores: Tensor,
    group_size: int,
    *,
    center: Literal["group_mean", "leave_one_out", "none"],
    scale: Literal["group_std", "batch_std", "none"],
    std_ddof: int,
    std_eps: float,
    scored: Tensor | None = None,
    all_sum: AllSum = local_sum,
) -> Tensor:
    """Advantages of completions relative to their group, (rows,). Rows of one group are adjacent.

        A_i = (R_i - b_i) / (s + std_eps),    b_i: mean of the group, mean of the others in it (RLOO), or 0
                                              s: standard deviation of the group or of all scores; none: no division

    GRPO (arXiv 2402.03300, section 4.1.2), Dr. GRPO (2503.20783), RLOO (2402.14740). In a group of equal scores every
    centred advantage is exactly 0, however the mean is rounded.

    Args:
        scores: (rows,).
        center: Chooses b.
        scale: Chooses s.
        std_ddof: The variance behind s divides by the number of scores minus this.
        scored: (rows,) bool, False for a completion without a score: it gets 0 and counts in no mean or deviation.
        all_sum: Adds over processes. No group may be split between processes.
    """
    if len(scores) % group_size:
        raise ValueError(
            f"group_advantages needs whole groups: got {len(scores)} scores for group_size={group_size}. Rows of one "
            "prompt must be adjacent; check completions_per_prompt and that no row was dropped."
        )
    counts = torch.ones_like(scores, dtype=torch.bool) if scored is None else scored
    grouped, inside = torch.where(counts, scores, 0.0).view(-1, group_size), counts.view(-1, group_size)
    number = inside.sum(1, keepdim=True)
    mean = grouped.sum(1, keepdim=True) / number.clamp(min=1)
    deviations = torch.where(inside & ~equal_groups(scores, group_size, counts).unsqueeze(1), grouped - mean, 0.0)
    centred = grouped if center == "none" else deviations
    if center == "leave_one_out":
        centred = deviations * number / (number - 1).clamp(min=1)
    if scale == "group_std":
        centred = centred / ((deviations**2).sum(1, keepdim=True) / (number - std_ddof).clamp(min=1)).sqrt().add(
            std_eps
        )
    elif scale == "batch_std":
        n, total = all_sum(torch.stack([number.sum().to(scores.dtype), grouped.sum()]))
        squares = all_sum((torch.where(inside, grouped - total / n.clamp(min=1), 0.0) ** 2).sum())
        centred = centred / ((squares / (n - std_ddof).clamp(min=1)).sqrt() + std_eps)
    return centred.reshape(-1)


def equal_groups(scores: Tensor, group_size: int, scored: Tensor | None = None) -> Tensor:
    """(groups,) bool: True if the scores of the group are equal up to rounding, or there is at most one, so that
    comparing them teaches nothing."""
    grouped = scores.view(-1, group_size)
    inside = torch.ones_like(grouped, dtype=torch.bool) if scored is None else scored.view(-1, group_size)
    highest = torch.where(inside, grouped, -torch.inf).amax(1)
    lowest = torch.where(inside, grouped, torch.inf).amin(1)
    size = torch.where(inside, grouped.abs(), 0.0).amax(1).clamp(min=1.0)
    return highest - lowest <= EQUAL * size


def return_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Undiscounted sum of the rewards from each step on, (rows, time); 0 where `mask` is False."""
    masked = torch.where(mask, rewards, 0.0)
    return torch.where(mask, masked.flip(-1).cumsum(-1).flip(-1), 0.0)
