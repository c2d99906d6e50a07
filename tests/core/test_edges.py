"""The smallest, largest and emptiest inputs of the cores: finite values and gradients, and those of plain Python."""

import math

import pytest
import torch

from rlhf.core.advantages import gae, group_advantages, return_to_go
from rlhf.core.kl import MAX_LOG_RATIO, kl_estimate, kl_loss
from rlhf.core.losses import (
    clipped_surrogate,
    clipped_value_loss,
    clipped_weight_surrogate,
    log_ratio,
    unclipped_surrogate,
)
from rlhf.core.masking import masked_mean, whiten

pytestmark = pytest.mark.slow
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""dtype -> relative tolerance against plain Python, whose numbers have 53 bits."""
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
DISTANCES = (-200.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 200.0)
"""Log-ratios; beyond 20 nats they count as 20."""


def leaf(values, dtype):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def check(got, expected, leaves, dtype) -> None:
    """`got` is what plain Python says, and it and its gradients are finite."""
    got.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)
    assert got.isfinite().all()
    for number, wanted in zip(got.detach().double().flatten().tolist(), expected, strict=True):
        assert number == pytest.approx(wanted, rel=TYPES[dtype], abs=TYPES[dtype])


def clamped(d: float) -> float:
    return max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, d))


@dtypes
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_of_the_kl_between_policies_that_are_far_apart(estimator, distance, dtype):
    here = leaf([distance], dtype)
    d = here.detach().double().item()  # as the type rounds it
    plain = {"k1": d, "k2": d * d / 2, "k3": math.expm1(-clamped(d)) + clamped(d)}
    check(kl_estimate(here, torch.zeros(1, dtype=dtype), estimator), [plain[estimator]], [here], dtype)


@dtypes
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["clipped", "dual clip", "unclipped", "clipped weight"])
def test_losses_of_policies_that_are_far_apart(name, distance, dtype):
    new, advantages = leaf([[distance, distance, distance]], dtype), torch.tensor([[2.0, -2.0, 1.0]], dtype=dtype)
    old, mask = torch.zeros_like(advantages), torch.tensor([[True, True, False]])
    ratio, log = math.exp(clamped(new[0, 0].item())), new[0, 0].item()
    bounded = max(0.8, min(1.2, ratio))
    clipped = [-min(ratio * 2, bounded * 2), -min(ratio * -2, bounded * -2), -1.0]
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    got, expected = {
        "clipped": (clipped_surrogate(new, old, advantages, mask, **bounds), clipped),
        "dual clip": (
            clipped_surrogate(new, old, advantages, mask, **bounds, dual_clip=3.0),
            [clipped[0], min(clipped[1], 6.0), -1.0],
        ),
        "unclipped": (unclipped_surrogate(new, old, advantages, mask), [-2 * ratio, 2 * ratio, -1.0]),
        "clipped weight": (
            clipped_weight_surrogate(new, log_ratio(new, old, mask), advantages, mask, **bounds),
            [-bounded * 2 * log, bounded * 2 * log, 0.0],
        ),
    }[name]
    check(got, expected, [new], dtype)


@dtypes
@pytest.mark.parametrize("estimator", ["k2", "k3", "weighted_k3", "sequence_k2", "sequence_k3"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_kl_loss_far_from_the_reference_and_in_rows_without_a_token(distance, estimator, dtype):
    new = leaf([[distance], [math.nan]], dtype)
    mask = torch.tensor([[True], [False]])
    d, one = new[0, 0].item(), torch.ones(2, 1, dtype=dtype)
    plain = d * d / 2 if "k2" in estimator else math.expm1(-clamped(d)) + clamped(d)
    check(kl_loss(new, torch.zeros_like(one), one, mask, estimator), [plain, 0.0], [new], dtype)


@dtypes
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("valid", [True, False])
def test_advantages_of_episodes_of_one_step_and_of_none(valid, ends, dtype):
    rewards, values, following = leaf([[0.5]], dtype), leaf([[-2.0]], dtype), leaf([[4.0]], dtype)
    flags = torch.tensor([[ends]])
    settings = {"gamma": 0.5, "gae_lambda": 0.25}
    advantages, returns = gae(rewards, values, following, flags, flags, torch.tensor([[valid]]), **settings)
    expected = (0.5 + (0.0 if ends else 0.5 * 4.0) + 2.0) if valid else 0.0
    both = torch.cat([advantages, returns])
    check(both, [expected, expected - 2.0 if valid else 0.0], [rewards, values, following], dtype)


@dtypes
@pytest.mark.parametrize("size", [2, 3, 7, 64])
@pytest.mark.parametrize("center", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_groups_of_equal_rewards_of_a_tenth_and_groups_without_a_score(scale, center, size, dtype):
    """A tenth has no exact binary number, so the mean of several may differ from each."""
    settings = {"center": center, "scale": scale, "std_ddof": 1, "std_eps": 1e-6}
    scores = torch.full((2 * size,), 0.1, dtype=dtype)
    assert group_advantages(scores, size, **settings).eq(0).all()
    scores[:size] = math.nan  # the first group has no score
    scored = torch.arange(2 * size) >= size
    assert group_advantages(scores, size, **settings, scored=scored).eq(0).all()


@dtypes
@pytest.mark.parametrize("size", [1, 7])
def test_means_whitening_and_sums_of_nothing_and_of_equal_numbers(size, dtype):
    for value, valid in ((0.1, True), (0.1, False), (math.nan, False)):
        values = leaf([[value] * size], dtype)
        mask = torch.full((1, size), valid)
        here = values[0, 0].item()
        # whitening divides by sqrt(1e-8) what the mean's rounding leaves of 0: at most eps / 1e-4
        whitened = whiten(values, mask)
        assert whitened.isfinite().all() and whitened.abs().max() <= 1e4 * torch.finfo(dtype).eps
        check(masked_mean(values, mask).view(1), [here if valid else 0.0], [values], dtype)
        sums = [here * (size - t) if valid else 0.0 for t in range(size)]
        check(return_to_go(values, mask), sums, [values], dtype)


@dtypes
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_value_losses_far_from_the_return(value, clip, dtype):
    values, old, returns = (
        leaf([[value, math.nan]], dtype),
        torch.zeros(1, 2, dtype=dtype),
        torch.ones(1, 2, dtype=dtype),
    )
    v = values[0, 0].item()
    near = v if clip is None else max(-clip, min(clip, v))
    expected = 0.5 * max((v - 1) ** 2, (near - 1) ** 2)
    mask = torch.tensor([[True, False]])
    check(clipped_value_loss(values, old, returns, mask, value_clip_range=clip), [expected, 0.0], [values], dtype)


def test_the_check_notices_a_clamp_after_exp():
    """Negative control: value finite, gradient not."""
    new = leaf([200.0], torch.float32)
    with pytest.raises(AssertionError):
        check((new.exp().clamp(max=1e6) * 0 + new * 0), [0.0], [new], torch.float32)
