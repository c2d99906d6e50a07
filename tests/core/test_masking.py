"""Masked reductions: what is masked never counts, whatever it holds, and processes add up to one."""

import pytest
import torch

from rlhf.core.masking import masked_mean, masked_sum, weighted_sum, whiten
from tests import broken
from tests.controls import names, refute, run_ranks

# 1, 2, 3, 4 count; pads hold something else.
MASK = torch.tensor([[True, True, False], [True, True, False]])


def numbers(pad: float) -> torch.Tensor:
    return torch.tensor([[1, 2, pad], [3, 4, pad]], dtype=torch.float64)


@pytest.mark.parametrize("pad", [0.0, 100.0, float("nan"), float("inf")])
def test_sum_and_mean_do_not_see_masked_elements(pad):
    assert masked_sum(numbers(pad), MASK) == 10
    assert masked_mean(numbers(pad), MASK) == 2.5


def test_the_mean_of_nothing_is_zero():
    assert masked_mean(numbers(1.0), torch.zeros_like(MASK)) == 0


# --- whitening (D19) ---


def check_whitening(whiten) -> None:
    """1, 2, 3, 4 have mean 2.5 and variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25: +-1.5 and +-0.5 over sqrt(1.25)."""
    for pad in (0.0, -7.0, 1e6):
        result = whiten(numbers(pad), MASK)
        expected = torch.tensor([[-1.5, -0.5, 0], [0.5, 1.5, 0]], dtype=torch.float64) / 1.25**0.5
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)
        kept = whiten(numbers(pad), MASK, shift_mean=False)
        torch.testing.assert_close(kept, torch.where(MASK, expected + 2.5, 0.0), rtol=0, atol=1e-7)


def test_whitening_gives_mean_0_and_variance_1_over_the_mask_and_0_elsewhere():
    check_whitening(whiten)


WHITENING = [
    broken.whiten_adds_the_mean_back,
    broken.whiten_ignores_the_mask,
    broken.whiten_divides_by_count_minus_one,
    broken.whiten_leaves_masked_elements,
]


@pytest.mark.parametrize("variant", WHITENING, ids=names(WHITENING))
def test_the_whitening_check_notices(variant):
    refute(check_whitening, variant)


def test_equal_values_are_whitened_to_zero_not_to_nan():
    assert torch.equal(whiten(torch.full((2, 3), 4.0), MASK), torch.zeros(2, 3))
    assert torch.equal(whiten(numbers(1.0), torch.zeros_like(MASK)), torch.zeros(2, 3).double())


@pytest.mark.parametrize("function", [masked_mean, whiten], ids=["masked_mean", "whiten"])
def test_processes_with_unequal_shares_agree_with_one(function):
    """Rows of 1 + 4 elements on two processes: a mean of the processes' means would be wrong."""
    torch.manual_seed(0)
    values, mask = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4) < 0.6
    shares = [slice(0, 1), slice(1, 5)]
    whole = function(values, mask)
    parts = run_ranks(lambda rank, all_sum: function(values[shares[rank]], mask[shares[rank]], all_sum=all_sum), 2)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part, whole if whole.ndim == 0 else whole[shares[rank]], rtol=0, atol=1e-12)


# --- the one reduction of every loss (D18) ---


def check_reduction(weighted_sum) -> None:
    """Losses [1] * 8 and [3] * 2 in rows of unequal length: the token mean is 14 / 10, the mean of row means 2."""
    losses = torch.tensor([[1.0] * 8, [3.0, 3.0] + [float("nan")] * 6], dtype=torch.float64)
    weight = torch.tensor([[1.0] * 8, [1.0, 1.0] + [0.0] * 6], dtype=torch.float64)
    assert weighted_sum(losses, weight, weight.sum()).item() == pytest.approx(1.4, abs=1e-12)
    by_row = sum(weighted_sum(losses[row], weight[row], weight.sum()) for row in range(2))
    assert by_row.item() == pytest.approx(1.4, abs=1e-12)


def test_the_reduction_is_a_share_of_a_global_mean_however_rows_are_split():
    check_reduction(weighted_sum)


REDUCTIONS = [
    broken.weighted_sum_ignores_the_weights,
    broken.weighted_sum_multiplies_before_excluding,
    broken.weighted_sum_averages_its_own_elements,
]


@pytest.mark.parametrize("variant", REDUCTIONS, ids=names(REDUCTIONS))
def test_the_reduction_check_notices(variant):
    refute(check_reduction, variant)


def test_elements_of_weight_zero_have_no_gradient_even_if_they_are_nan():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    weighted_sum(values, torch.tensor([0.5, 0.0, 2.0]), 2.0).backward()
    assert values.grad.tolist() == [0.25, 0.0, 1.0]
