"""Scaling of rewards against the variance of every discounted sum so far, computed directly with NumPy."""

import numpy as np
import pytest
import torch

from gym_baselines.normalize import RewardScale
from rlhf.core.masking import local_sum
from rlhf.types import Trajectories
from tests.controls import names, refute, run_ranks

GAMMA = 0.9
EXACT = {"rtol": 0, "atol": 1e-12}


def rollout(seed: int, *, rows: int = 4, time: int = 25, scale: float = 3.0, dtype=torch.float64) -> Trajectories:
    """Random rewards with a mean that is not 0, random ends, and a ghost after each, as NEXT_STEP has them."""
    generator = torch.Generator().manual_seed(seed)
    rewards = scale * (torch.randn(rows, time, generator=generator, dtype=torch.float64) + 0.7)
    ends = torch.rand(rows, time, generator=generator) < 0.15
    mask = torch.ones(rows, time, dtype=torch.bool)
    for t in range(1, time):
        mask[:, t] = ~ends[:, t - 1]
        ends[:, t] &= mask[:, t]
    zeros = torch.zeros(rows, time, dtype=torch.float64)
    return Trajectories(
        inputs={},
        actions=zeros.long(),
        mask=mask,
        rewards=torch.where(mask, rewards, 0.0).to(dtype),
        sampling_logprobs=zeros,
        old_logprobs=zeros,
        values=zeros,
        next_values=zeros,
        terminated=ends,
        episode_ends=ends,
        row_tokens=torch.full((rows,), time),
        row_index=torch.arange(rows),
    )


def changed(trajectories: Trajectories, **changes) -> Trajectories:
    return Trajectories(**{**vars(trajectories), **changes})


def part(trajectories: Trajectories, rows: slice, times: slice = slice(None)) -> Trajectories:
    timed = ("actions", "mask", "rewards", "sampling_logprobs", "old_logprobs", "values", "next_values")
    timed += ("terminated", "episode_ends")
    cut = {name: getattr(trajectories, name)[rows, times] for name in timed}
    cut |= {name: getattr(trajectories, name)[rows] for name in ("row_tokens", "row_index")}
    return changed(trajectories, **cut)


class Directly:
    """Keeps every discounted sum there ever was, and takes their variance anew for each rollout."""

    def __init__(self, rows: int) -> None:
        self.running, self.sums = [0.0] * rows, []

    def __call__(self, trajectories: Trajectories) -> torch.Tensor:
        for row, running in enumerate(self.running):
            for t in range(trajectories.rewards.shape[1]):
                if not trajectories.mask[row, t]:
                    continue
                running = GAMMA * running + float(trajectories.rewards[row, t])
                self.sums.append(running)
                if trajectories.episode_ends[row, t]:
                    running = 0.0
            self.running[row] = running
        deviation = float(np.sqrt(np.var(self.sums) + 1e-8))
        return (trajectories.rewards / deviation).clamp(-10, 10)


def check_direct(make_scale) -> None:
    scale, directly = make_scale(4, gamma=GAMMA), Directly(4)
    for seed in range(4):
        given = rollout(seed, scale=1.0 + seed)
        found, wanted = scale(given, local_sum), directly(given)
        torch.testing.assert_close(found[given.mask], wanted[given.mask], **EXACT)


def test_rewards_are_divided_by_the_deviation_of_all_discounted_sums_so_far():
    check_direct(RewardScale)


class NeverResets(RewardScale):
    def _discounted_sums(self, rewards, mask, ends):
        return super()._discounted_sums(rewards, mask, torch.zeros_like(ends))


class CountsGhosts(RewardScale):
    def __call__(self, trajectories, all_sum):
        return super().__call__(changed(trajectories, mask=torch.ones_like(trajectories.mask)), all_sum)


class ForgetsBetweenRollouts(RewardScale):
    def __call__(self, trajectories, all_sum):
        self.discounted = torch.zeros_like(self.discounted)
        return super().__call__(trajectories, all_sum)


class TakesTheLastRolloutAlone(RewardScale):
    def __call__(self, trajectories, all_sum):
        self.moments = torch.zeros(3, dtype=torch.float64)
        return super().__call__(trajectories, all_sum)


class ScalesBeforeTakingIn(RewardScale):
    def __call__(self, trajectories, all_sum):
        before = self.moments
        super().__call__(trajectories, all_sum)
        count, _, squares = before if before[0] > 0 else torch.ones(3, dtype=torch.float64)
        return (trajectories.rewards / (squares / count + 1e-8).sqrt()).clamp(-10, 10)


class MovesTheMean(RewardScale):
    def __call__(self, trajectories, all_sum):
        return super().__call__(trajectories, all_sum) - float(self.moments[1])


class DividesByTheVariance(RewardScale):
    def __call__(self, trajectories, all_sum):
        super().__call__(trajectories, all_sum)
        return (trajectories.rewards / (self.moments[2] / self.moments[0])).clamp(-10, 10)


BROKEN = [
    *(NeverResets, CountsGhosts, ForgetsBetweenRollouts, TakesTheLastRolloutAlone),
    *(ScalesBeforeTakingIn, MovesTheMean, DividesByTheVariance),
]


@pytest.mark.parametrize("variant", BROKEN, ids=names(BROKEN))
def test_the_direct_check_notices(variant):
    refute(check_direct, variant)


def test_the_mean_is_scaled_but_not_moved_so_every_reward_keeps_its_sign():
    scale, given = RewardScale(4, gamma=GAMMA), rollout(0)
    scaled = scale(given, local_sum)
    ratios = (scaled / given.rewards)[given.mask]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-12, atol=0)
    assert ratios[0] > 0 and scaled[given.mask].mean() > 0.1


def test_scaled_rewards_are_limited_to_ten_on_both_sides():
    scale = RewardScale(4, gamma=GAMMA)
    scale(rollout(0), local_sum)
    given = rollout(1)
    rewards = given.rewards.clone()
    rewards[0, 0], rewards[1, 0] = 1e4, -1e4
    for _ in range(20):  # so that two extreme rewards do not make the deviation
        scale(rollout(2), local_sum)
    scaled = scale(changed(given, rewards=rewards), local_sum)
    assert scaled[0, 0] == 10 and scaled[1, 0] == -10
    assert scaled.abs().max() == 10


def test_the_scale_of_the_rewards_does_not_matter_once_it_is_known():
    for factor in (1e-3, 1e3):
        plain, other = RewardScale(4, gamma=GAMMA), RewardScale(4, gamma=GAMMA)
        for seed in range(3):
            given = rollout(seed)
            large = changed(given, rewards=factor * given.rewards)
            found, wanted = other(large, local_sum), plain(given, local_sum)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 if factor < 1 else 1e-7)  # 1e-8 beside the variance


def test_the_statistics_do_not_depend_on_where_rollouts_are_cut():
    whole, pieces = RewardScale(4, gamma=GAMMA), RewardScale(4, gamma=GAMMA)
    given = rollout(3, time=60)
    whole(given, local_sum)
    for start, end in ((0, 7), (7, 8), (8, 40), (40, 60)):
        pieces(part(given, slice(None), slice(start, end)), local_sum)
    torch.testing.assert_close(pieces.moments, whole.moments, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.discounted, whole.discounted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shares", [(slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 4))])
def test_two_processes_scale_as_one(shares):
    def work(rank, all_sum):
        rows = shares[rank]
        scale = RewardScale(rows.stop - rows.start, gamma=GAMMA)
        return [scale(part(rollout(seed), rows), all_sum) for seed in range(3)], scale.moments

    one = RewardScale(4, gamma=GAMMA)
    wanted = [one(rollout(seed), local_sum) for seed in range(3)]
    (first, moments), (second, others) = run_ranks(work, 2)
    for parts, whole in zip(zip(first, second, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    assert torch.equal(moments, others)
    torch.testing.assert_close(moments, one.moments, rtol=1e-12, atol=1e-12)


def test_the_check_of_two_processes_notices_statistics_of_its_own():
    def work(rank, all_sum):
        scale = RewardScale(2, gamma=GAMMA)
        return scale(part(rollout(0), slice(2 * rank, 2 * rank + 2)), local_sum)

    one = RewardScale(4, gamma=GAMMA)
    assert (torch.cat(run_ranks(work, 2)) - one(rollout(0), local_sum)).abs().max() > 1e-3


def test_ghosts_may_hold_anything():
    given = rollout(5)
    assert not given.mask.all()
    dirty = changed(given, rewards=torch.where(given.mask, given.rewards, float("nan")))
    clean, other = RewardScale(4, gamma=GAMMA), RewardScale(4, gamma=GAMMA)
    wanted, found = clean(given, local_sum), other(dirty, local_sum)
    assert torch.equal(found[given.mask], wanted[given.mask])
    assert torch.equal(clean.moments, other.moments) and torch.equal(clean.discounted, other.discounted)


def test_rewards_of_zero_stay_zero_and_single_precision_stays_single():
    scale = RewardScale(4, gamma=GAMMA)
    given = rollout(0, dtype=torch.float32)
    nothing = scale(changed(given, rewards=torch.zeros_like(given.rewards)), local_sum)
    assert (nothing == 0).all() and nothing.dtype == torch.float32
    assert torch.isfinite(scale(given, local_sum)).all()


def test_a_large_mean_does_not_drown_the_variance():
    """Sums near 1e6 with a deviation near 1: one pass of sum and sum of squares would lose most of the digits."""
    scale, directly = RewardScale(4, gamma=0.0), []
    for seed in range(3):
        given = rollout(seed, scale=1.0)
        given = changed(given, rewards=given.rewards + 1e6)
        scale(given, local_sum)
        directly += given.rewards[given.mask].tolist()
    wanted = np.var(np.array(directly, dtype=np.longdouble))
    assert float(scale.moments[2] / scale.moments[0]) == pytest.approx(float(wanted), rel=1e-9)
