"""The policy that sampled is the one that trains: what is compared, and when that ends the run."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.training.sampler import Agreement, check_sampler


def batch(**changes):
    """Log-probs that differ by 0.25 and 0.1 where they count, and by 50 where they do not."""
    fields = {
        "mask": torch.tensor([[True, True], [True, False]]),
        "sampling_logprobs": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "old_logprobs": torch.tensor([[-1.0, -2.25], [-2.9, -50.0]]),
    }
    return SimpleNamespace(**fields | changes)


def test_the_gap_and_the_entropy_leave_padding_out():
    """Gap: the largest |sampling - training| over tokens that count. Entropy: the mean of -log-prob over the same."""
    metrics = check_sampler(batch(), Agreement(bound=0.3, remedy=""), 0)
    assert metrics["sampler_gap"] == pytest.approx(0.25) and metrics["entropy"] == pytest.approx((1 + 2.25 + 2.9) / 3)


def test_a_gap_beyond_the_bound_ends_the_run_with_its_size_and_the_remedy():
    with pytest.raises(TrainingError, match=r"0\.25 nats in step 7 \(limit 0\.2\).*Nothing was trained.*Look at it\."):
        check_sampler(batch(), Agreement(bound=0.2, remedy="Look at it."), 7)
