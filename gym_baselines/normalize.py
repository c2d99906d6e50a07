"""Scales rewards by running statistics, equal on all processes. (For observations see layers.Normalizer.)"""

import torch
from torch import Tensor

from rlhf.core.masking import AllSum
from rlhf.types import Trajectories

LIMIT = 10.0


class RewardScale:
    """Divides rewards by the running standard deviation of their discounted sum (no centring), and clips to +-10.

    Huang et al. 2022, "The 37 implementation details of PPO", robotics details 8 and 9. Each rollout, over all
    processes, is added to the statistics once, before it is scaled.
    """

    def __init__(self, num_rows: int, *, gamma: float) -> None:
        self.gamma = gamma
        self.discounted = torch.zeros(num_rows, dtype=torch.float64)  # discounted sums of the running episodes
        self.moments = torch.zeros(3, dtype=torch.float64)  # count, mean, sum of squared deviations

    def __call__(self, trajectories: Trajectories, all_sum: AllSum) -> Tensor:
        """Scaled rewards, (rows, time), which replace trajectories.rewards in learning."""
        rewards = trajectories.rewards.double().cpu()
        mask = trajectories.mask.cpu()
        sums = self._discounted_sums(rewards, mask, trajectories.episode_ends.cpu())
        self._take_in(torch.where(mask, sums, 0.0), mask, all_sum)
        count, _, squares = self.moments
        scaled = (rewards / (squares / count + 1e-8).sqrt()).clamp(-LIMIT, LIMIT)
        return scaled.to(trajectories.rewards)

    def _discounted_sums(self, rewards: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        sums = torch.empty_like(rewards)
        running = self.discounted
        for t in range(rewards.shape[1]):
            running = torch.where(mask[:, t], self.gamma * running + rewards[:, t], running)
            sums[:, t] = running
            running = torch.where(ends[:, t], 0.0, running)
        self.discounted = running
        return sums

    def _take_in(self, values: Tensor, mask: Tensor, all_sum: AllSum) -> None:
        """Merge the moments of `values` into the running ones (Chan et al. 1983)."""
        count, total = all_sum(torch.stack([mask.sum().double(), values.sum()]))
        mean = total / count.clamp(min=1)
        squares = all_sum(torch.where(mask, (values - mean) ** 2, 0.0).sum())
        old_count, old_mean, old_squares = self.moments
        merged = (old_count + count).clamp(min=1)
        shift = mean - old_mean
        self.moments = torch.stack(
            [
                old_count + count,
                old_mean + shift * count / merged,
                old_squares + squares + shift**2 * old_count * count / merged,
            ]
        )
