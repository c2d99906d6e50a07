"""The Bradley-Terry loss against closed forms and against torch's own pieces."""

import math

import pytest
import torch

from rlhf.core.preference import bradley_terry_loss


def fitted_scores(loss, win_rate):
    """Minimise over the scores of two items of which the first wins `win_rate` of the comparisons: Newton, float64."""
    scores = torch.tensor([0.3, -0.1], dtype=torch.float64)

    def expected(r):
        return win_rate * loss(r[:1], r[1:]).sum() + (1 - win_rate) * loss(r[1:], r[:1]).sum()

    for _ in range(12):
        gradient = torch.autograd.functional.jacobian(expected, scores)
        hessian = torch.autograd.functional.hessian(expected, scores)
        scores = scores - torch.linalg.pinv(hessian, hermitian=True) @ gradient  # the sum of the scores may be free
    return scores


@pytest.mark.parametrize("win_rate", [0.6, 0.75, 0.9])
def test_fitted_gap_is_the_log_odds_of_winning(win_rate):
    scores = fitted_scores(bradley_terry_loss, win_rate)
    assert scores[0] - scores[1] == pytest.approx(math.log(win_rate / (1 - win_rate)), abs=1e-8)


@pytest.mark.parametrize("win_rate", [0.6, 0.9])
def test_centring_makes_the_fitted_scores_sum_to_zero_and_keeps_the_gap(win_rate):
    scores = fitted_scores(lambda a, b: bradley_terry_loss(a, b, center_coefficient=0.01), win_rate)
    assert scores.sum() == pytest.approx(0.0, abs=1e-8)
    assert scores[0] - scores[1] == pytest.approx(math.log(win_rate / (1 - win_rate)), abs=1e-8)


def test_without_centring_the_sum_of_the_scores_stays_where_it_started():
    assert fitted_scores(bradley_terry_loss, 0.75).sum() == pytest.approx(0.2, abs=1e-8)


def fitted_gap_with_margin(loss, win_rate, margin):
    """Best gap of a pair whose first item should lead by `margin`; the loser's view has the margin the other way."""
    gap, zero = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def expected(g):
        return (win_rate * loss(g, zero, margin=margin) + (1 - win_rate) * loss(zero, g, margin=-margin)).sum()

    for _ in range(12):
        slope = torch.autograd.functional.jacobian(expected, gap)
        gap = gap - slope / torch.autograd.functional.hessian(expected, gap).squeeze(0)
    return gap.item()


def test_a_margin_shifts_the_fitted_gap_by_itself():
    expected = 0.8 + math.log(0.75 / 0.25)
    assert fitted_gap_with_margin(bradley_terry_loss, 0.75, 0.8) == pytest.approx(expected, abs=1e-8)


def test_controls_a_flipped_sign_or_margin_misses_the_closed_forms():
    def flipped(chosen, rejected):
        return bradley_terry_loss(rejected, chosen)

    def flipped_margin(chosen, rejected, margin):
        return bradley_terry_loss(chosen, rejected, margin=-margin)

    scores = fitted_scores(flipped, 0.75)
    assert abs(scores[0] - scores[1] - math.log(3)) > 1
    assert abs(fitted_gap_with_margin(flipped_margin, 0.75, 0.8) - (0.8 + math.log(3))) > 1


def test_gradient_is_sigmoid_of_the_gap_minus_one_for_the_winner_and_its_negative_for_the_loser():
    chosen = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(chosen, rejected).sum().backward()
    slope = 1 / (1 + torch.exp(-(chosen - rejected).detach())) - 1
    torch.testing.assert_close(chosen.grad, slope)
    torch.testing.assert_close(rejected.grad, -slope)


def test_a_hopelessly_wrong_pair_has_a_finite_loss_and_a_gradient_of_minus_one():
    chosen = torch.tensor([-2000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([2000.0]))
    loss.sum().backward()
    assert loss.item() == 4000.0  # log(1 + exp(4000)) = 4000, where log(sigmoid) would be -inf
    assert chosen.grad.item() == -1.0


def test_the_loss_is_elementwise_and_takes_a_margin_per_pair():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    loss = bradley_terry_loss(chosen, rejected, margin=torch.tensor([1.0, 0.0]), center_coefficient=0.1)
    expected = [math.log(2) + 0.1, math.log(1 + math.exp(-1)) + 0.1]
    torch.testing.assert_close(loss, torch.tensor(expected))
