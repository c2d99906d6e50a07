"""GAE against sums over segments, worked out without a recursion."""

import pytest
import torch

from rlhf.core.advantages import gae
from tests import broken
from tests.controls import names, refute
from tests.rounding import EPS

EXACT = {"rtol": 0, "atol": 1e-12}


def by_definition(rewards, values, next_values, terminated, episode_ends, mask, gamma, gae_lambda):
    """A_t = sum over the valid steps u >= t of the episode of (gamma lambda)^(valid steps between t and u) * delta_u."""
    rows, time = rewards.shape
    advantages = torch.zeros(rows, time, dtype=rewards.dtype)
    for row in range(rows):
        for t in range(time):
            if not mask[row, t]:
                continue
            weight, total = 1.0, 0.0
            for u in range(t, time):
                if mask[row, u]:
                    bootstrap = 0.0 if terminated[row, u] else gamma * next_values[row, u]
                    total += weight * (rewards[row, u] + bootstrap - values[row, u])
                    weight *= gamma * gae_lambda
                if episode_ends[row, u]:
                    break
            advantages[row, t] = total
    return advantages, torch.where(mask, advantages + values, 0.0)


def random_case(seed: int, *, rows=5, time=10, dtype=torch.float64):
    """Random ends: terminated only, truncated only, both at once, at the last index too; random holes, also over an end."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(rows, time, generator=generator)

    terminated, truncated = uniform() < 0.15, uniform() < 0.15
    truncated[0, -1], terminated[0, -1] = True, False
    truncated[1, -1], terminated[1, -1] = True, True
    truncated[2, 3], terminated[2, 3] = True, True
    terminated[3], truncated[3] = False, False
    ends = terminated | truncated
    mask = uniform() > 0.25
    numbers = [torch.randn(rows, time, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return (*numbers, terminated, ends, mask)


def check_segments(gae) -> None:
    for seed in range(3):
        for gamma, gae_lambda in [(0.9, 0.8), (1.0, 0.95), (0.99, 1.0), (0.9, 0.0)]:
            case = random_case(seed)
            advantages, returns = gae(*case, gamma=gamma, gae_lambda=gae_lambda)
            wanted, wanted_returns = by_definition(*case, gamma, gae_lambda)
            torch.testing.assert_close(advantages, wanted, **EXACT)
            torch.testing.assert_close(returns, wanted_returns, **EXACT)


def test_the_recursion_equals_the_sum_over_segments_for_every_pattern_of_ends_and_holes():
    check_segments(gae)


VARIANTS = [
    broken.gae_swaps_its_masks,
    broken.gae_takes_truncation_for_termination,
    broken.gae_ignores_episode_ends,
    broken.gae_cuts_only_at_terminations,
    broken.gae_bootstraps_after_terminations,
    broken.gae_bootstraps_from_the_same_state,
    broken.gae_counts_what_is_masked,
    broken.gae_zeroes_holes_instead_of_passing_over_them,
    broken.gae_forgets_lambda,
    broken.gae_has_the_wrong_sign,
    broken.gae_returns_advantages_as_returns,
]


@pytest.mark.parametrize("variant", VARIANTS, ids=names(VARIANTS))
def test_the_check_of_segments_notices(variant):
    refute(check_segments, variant)


def test_float32_agrees_to_a_relative_1e_5():
    case = random_case(0, dtype=torch.float32)
    advantages, _ = gae(*case, gamma=0.99, gae_lambda=0.95)
    wanted, _ = by_definition(*(x.double() if x.is_floating_point() else x for x in case), 0.99, 0.95)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), wanted, rtol=128 * EPS, atol=128 * EPS)


def test_masked_elements_are_zero_and_may_hold_anything():
    case = random_case(1)
    mask = case[-1]
    clean = gae(*case, gamma=0.9, gae_lambda=0.8)
    dirty = [torch.where(mask, x, float("nan")) for x in case[:3]]
    for ours, theirs in zip(gae(*dirty, *case[3:], gamma=0.9, gae_lambda=0.8), clean, strict=True):
        assert torch.equal(ours, theirs) and (ours[~mask] == 0).all()


def test_no_value_is_read_behind_a_termination():
    case = list(random_case(2))
    clean = gae(*case, gamma=0.9, gae_lambda=0.8)
    case[2] = torch.where(case[3], float("nan"), case[2])
    for ours, theirs in zip(gae(*case, gamma=0.9, gae_lambda=0.8), clean, strict=True):
        assert torch.equal(ours, theirs)


def check_time_limit(gae) -> None:
    """D9: reward 1 for ever, exact V = 1 / (1 - gamma) = 100, cut by a limit of 50: nothing is better than expected.

    The step after the cut belongs to another episode; its reward of -1000 must not be heard of.
    """
    gamma, time = 0.99, 60
    shape = (1, time)
    rewards, values = torch.ones(shape).double(), torch.full(shape, 1 / (1 - gamma)).double()
    rewards[0, 50:] = -1000.0
    ends = torch.zeros(shape, dtype=torch.bool)
    ends[0, 49] = True
    nothing = torch.zeros(shape, dtype=torch.bool)
    advantages, returns = gae(rewards, values, values, nothing, ends, ~nothing, gamma=gamma, gae_lambda=0.95)
    torch.testing.assert_close(advantages[0, :50], torch.zeros(50).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(returns[0, :50], values[0, :50], rtol=0, atol=1e-10)


def test_a_time_limit_neither_costs_nor_leaks():
    check_time_limit(gae)
    refute(check_time_limit, broken.gae_takes_truncation_for_termination)
    refute(check_time_limit, broken.gae_cuts_only_at_terminations)
    refute(check_time_limit, broken.gae_ignores_episode_ends)


def test_truncation_taken_for_termination_costs_exactly_gamma_over_one_minus_gamma():
    """D9's number: the last advantage would be 1 - 100 = -99."""
    one = torch.ones(1, 1, dtype=torch.bool)
    value = torch.full((1, 1), 100.0).double()
    setting = {"gamma": 0.99, "gae_lambda": 0.95}
    wrong, _ = broken.gae_takes_truncation_for_termination(value / 100, value, value, ~one, one, one, **setting)
    right, _ = gae(value / 100, value, value, ~one, one, one, **setting)
    assert wrong.item() == pytest.approx(-99, abs=1e-10) and right.item() == pytest.approx(0, abs=1e-10)


def test_termination_wins_over_truncation():
    """Both flags: the state has no future, so its value, however large, is not added."""
    one = torch.ones(1, 1, dtype=torch.bool)
    reward, value, after = (torch.tensor([[x]]).double() for x in (2.0, 0.5, 1000.0))
    advantages, returns = gae(reward, value, after, one, one, one, gamma=0.9, gae_lambda=0.95)
    assert advantages.item() == 1.5 and returns.item() == 2.0


# --- holes: tokens of a tool or an environment inside a completion ---


def hole_case():
    """Six tokens, the third and fourth masked, reward 1 at the end, all values 0: A_0 = 0.95^3 over three valid steps."""
    mask = torch.tensor([[True, True, False, False, True, True]])
    end = torch.tensor([[False] * 5 + [True]])
    rewards, values = torch.zeros(1, 6).double(), torch.zeros(1, 6).double()
    rewards[0, -1] = 1.0
    return rewards, values, values, end, end, mask


def check_decay_over_a_hole(gae) -> None:
    advantages, _ = gae(*hole_case(), gamma=1.0, gae_lambda=0.95)
    expected = torch.tensor([[0.95**3, 0.95**2, 0, 0, 0.95, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, **EXACT)


def test_a_hole_inside_an_episode_is_passed_over_without_decay():
    check_decay_over_a_hole(gae)
    refute(check_decay_over_a_hole, broken.gae_counts_what_is_masked)
    refute(check_decay_over_a_hole, broken.gae_zeroes_holes_instead_of_passing_over_them)


def check_values_around_a_hole(gae) -> None:
    """With values 0.1, 0.2, (hole), 0.4, 0.6 and reward 1 at the end, delta = 0.1, 0.2, 0.2, 0.4 over the valid steps.

    A_0 = 0.1 + 0.95 * 0.2 + 0.95^2 * 0.2 + 0.95^3 * 0.4 = 0.81345. Trainers that only zero what is masked get 0.72536.
    """
    rewards, _, _, end, _, mask = hole_case()
    values = torch.tensor([[0.1, 0.2, 9.0, 9.0, 0.4, 0.6]], dtype=torch.float64)
    after = torch.tensor([[0.2, 0.4, 9.0, 9.0, 0.6, 0.0]], dtype=torch.float64)  # of the next valid token
    advantages, _ = gae(rewards, values, after, end, end, mask, gamma=1.0, gae_lambda=0.95)
    assert advantages[0, 0].item() == pytest.approx(0.1 + 0.19 + 0.1805 + 0.34295, abs=1e-12)


def test_values_are_carried_over_a_hole_too():
    check_values_around_a_hole(gae)
    refute(check_values_around_a_hole, broken.gae_zeroes_holes_instead_of_passing_over_them)


def test_an_episode_that_ends_inside_a_hole_does_not_hear_of_the_next_one():
    """Rows may hold several episodes; advantages are carried over masked positions only inside one."""
    mask = torch.tensor([[True, False, True]])
    ends = torch.tensor([[False, True, True]])
    rewards = torch.tensor([[1.0, 0.0, 100.0]]).double()
    zero = torch.zeros(1, 3).double()
    advantages, _ = gae(rewards, zero, zero, ends, ends, mask, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [[1.0, 0.0, 100.0]]


def test_lambda_1_is_the_monte_carlo_return_and_lambda_0_one_step():
    rewards = torch.tensor([[1.0, 2.0, 4.0]]).double()
    values = torch.tensor([[0.5, 0.25, 0.125]]).double()
    after = torch.tensor([[0.25, 0.125, 7.0]]).double()
    end = torch.tensor([[False, False, True]])
    mask = torch.ones_like(end)
    _, returns = gae(rewards, values, after, end, end, mask, gamma=0.5, gae_lambda=1.0)
    assert returns.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]]
    _, returns = gae(rewards, values, after, end, end, mask, gamma=0.5, gae_lambda=0.0)
    assert returns.tolist() == [[1 + 0.5 * 0.25, 2 + 0.5 * 0.125, 4.0]]
