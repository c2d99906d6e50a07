"""The policy that sampled is the one that trains: what is compared, and when that ends the run."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.training.sampler import Agreement, check_sampler
from tests.rounding import EPS


def batch(**changes):
    """Log-probs that differ by 0.25 and 0.1 where they count, and by 50 where they do not."""
    fields = {
        "mask": torch.tensor([[True, True], [True, False]]),
        "sampling_logprobs": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "old_logprobs": torch.tensor([[-1.0, -2.25], [-2.9, -50.0]]),
        "policy_version": None,
    }
    return SimpleNamespace(**fields | changes)


def wide(gaps: torch.Tensor):
    """One row of tokens with these gaps."""
    gaps = gaps.unsqueeze(0)
    return batch(mask=torch.ones_like(gaps, dtype=torch.bool), sampling_logprobs=gaps - 1, old_logprobs=0 * gaps - 1)


def test_the_gap_and_the_entropy_leave_padding_out():
    """Gap: the largest |sampling - training| over tokens that count. Entropy: the mean of -log-prob over the same."""
    metrics = check_sampler(batch(), Agreement(bound=0.3, remedy=""), 0)
    expected = {"sampler_gap": 0.25, "sampler_gap_mean": 0.35 / 3, "entropy": (1 + 2.25 + 2.9) / 3}
    assert metrics == pytest.approx(expected, rel=16 * EPS, abs=16 * EPS)


def test_a_gap_beyond_the_bound_ends_the_run_with_its_size_and_the_remedy():
    message = (
        r"up to 0\.25 nats in step 7 \(0\.117 on average, 1 of 3 by more than 0\.2\).*Nothing was trained.*Look at it\."
    )
    with pytest.raises(TrainingError, match=message):
        check_sampler(batch(), Agreement(bound=0.2, remedy="Look at it."), 7)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_log_probs_that_are_no_numbers_end_the_run(number, exact):
    gaps = torch.zeros(10)
    gaps[3:6] = number
    with pytest.raises(TrainingError):
        check_sampler(wide(gaps), Agreement(bound=1.0, remedy="", exact=exact), 0)


def test_actions_of_older_weights_are_left_out():
    """The token that is 0.25 off was sampled by version 4; those of version 5 are 0 and 0.1 off."""
    versions = torch.tensor([[5, 4], [5, 5]])
    metrics = check_sampler(batch(policy_version=versions), Agreement(bound=0.2, remedy=""), 5)
    rounding = 16 * EPS  # the gap is a difference of numbers around 1
    assert metrics["sampler_gap"] == pytest.approx(0.1, abs=rounding)
    assert metrics["sampler_gap_mean"] == pytest.approx(0.05, abs=rounding)
    assert "sampler_gap" not in check_sampler(batch(policy_version=versions), Agreement(bound=0.2, remedy=""), 6)


ROUGH = Agreement(bound=1.0, remedy="", exact=False)


def test_where_precision_differs_one_rare_token_does_not_end_the_run():
    gaps = torch.full((1000,), 0.01)
    gaps[[3, 500]] = torch.tensor([4.0, -30.0])
    assert check_sampler(wide(gaps), ROUGH, 0)["sampler_gap"] == pytest.approx(30.0)  # but it is logged
    with pytest.raises(TrainingError):
        check_sampler(wide(gaps), Agreement(bound=1.0, remedy="", exact=True), 0)
    assert check_sampler(wide(torch.tensor([0.01, 0.02, 1.5] + [0.0] * 20)), ROUGH, 0)  # nor in a small step


@pytest.mark.parametrize(
    ("name", "gaps"),
    [
        ("more than one in a hundred beyond the bound", torch.tensor([0.0] * 980 + [1.2] * 20)),
        ("a mean above a tenth of the bound", torch.full((1000,), 0.15)),
        ("another temperature: every token somewhat off", torch.linspace(-0.4, 0.4, 1000)),
    ],
)
def test_where_precision_differs_the_mean_and_the_share_beyond_the_bound_end_the_run(name, gaps):
    with pytest.raises(TrainingError):
        check_sampler(wide(gaps), ROUGH, 0)
