"""Advantage estimation."""

import torch
from torch import Tensor


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
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) and its returns, (rows, time) each.

        delta_t = r_t + gamma * (1 - terminated_t) * next_values_t - values_t
        A_t     = delta_t + gamma * gae_lambda * (1 - episode_ends_t) * A_{t+1},     R_t = A_t + values_t

    Two masks: `terminated` (the state after t has no future) cuts the bootstrap, `episode_ends` (terminated, truncated or
    both: what follows in the row is another episode) cuts the recursion. `next_values` is the value of the state that truly
    follows t: of the final observation at a time limit, of the next *valid* token across tokens that are masked out.
    Elements where `mask` is False (padding, tool tokens, ghost rows) get 0, and the recursion passes over them, within an
    episode: a masked element that ends one still cuts it.
    """
    bootstrap = torch.where(terminated, 0.0, gamma * next_values)
    deltas = torch.where(mask, rewards + bootstrap - values, 0.0)
    goes_on = (~episode_ends).to(values.dtype)
    decay = torch.where(mask, gamma * gae_lambda * goes_on, goes_on)  # a masked element hands on what follows it
    following = torch.zeros_like(values[:, 0])
    backwards = []
    for delta, factor in zip(reversed(deltas.unbind(1)), reversed(decay.unbind(1)), strict=True):
        following = torch.addcmul(delta, factor, following)
        backwards.append(following)
    advantages = torch.where(mask, torch.stack(backwards[::-1], dim=1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
