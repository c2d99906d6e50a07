"""PPO's losses, exactly: where their gradient is zero and what it is elsewhere."""

from math import exp

import pytest
import torch

from rlhf.core.losses import clipped_elements, clipped_surrogate, clipped_value_loss, log_ratio, unclipped_surrogate
from rlhf.core.masking import weighted_sum
from tests import broken, tree
from tests.controls import names, refute

EXACT = {"rtol": 0, "atol": 1e-12}
ON = torch.ones(1, 1, dtype=torch.bool)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def slope(loss, ratio: float, advantage: float, **bounds) -> float:
    """d(objective) / d(ratio) of one element: the gradient to the log-prob is ratio times that."""
    logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss(logprobs, torch.zeros_like(advantages), advantages, ON, **bounds).sum().backward()
    return -logprobs.grad.item() / ratio


# --- the clip table (D11) ---


def check_clip_table(clipped_surrogate) -> None:
    """A = +1: slope 1 up to 1.2, then 0. A = -1: 0 below 0.8, then -1, with a dual clip of 3 only up to 3. Exactly."""
    for ratio, when_positive, when_negative in [(0.1, 1, 0), (0.79, 1, 0), (0.81, 1, -1), (1.19, 1, -1), (1.21, 0, -1)]:
        assert slope(clipped_surrogate, ratio, 1.0, **CLIP) == pytest.approx(when_positive, abs=1e-12)
        assert slope(clipped_surrogate, ratio, -1.0, **CLIP) == pytest.approx(when_negative, abs=1e-12)
    for ratio, plain, dual in [(0.5, 0, 0), (1.0, -1, -1), (2.9, -1, -1), (3.1, -1, 0), (50.0, -1, 0)]:
        assert slope(clipped_surrogate, ratio, -1.0, **CLIP) == pytest.approx(plain, abs=1e-12)
        assert slope(clipped_surrogate, ratio, -1.0, dual_clip=3.0, **CLIP) == pytest.approx(dual, abs=1e-12)
        assert slope(clipped_surrogate, ratio, 1.0, dual_clip=3.0, **CLIP) == slope(
            clipped_surrogate, ratio, 1.0, **CLIP
        )
    asymmetric = {"clip_low": 0.1, "clip_high": 0.5}
    for ratio, when_positive, when_negative in [(0.85, 1, 0), (0.95, 1, -1), (1.45, 1, -1), (1.55, 0, -1)]:
        assert slope(clipped_surrogate, ratio, 1.0, **asymmetric) == pytest.approx(when_positive, abs=1e-12)
        assert slope(clipped_surrogate, ratio, -1.0, **asymmetric) == pytest.approx(when_negative, abs=1e-12)


def test_the_gradient_vanishes_exactly_where_the_clip_table_says():
    check_clip_table(clipped_surrogate)


CLIPS = [
    broken.clip_takes_the_larger_side,
    broken.clip_is_missing,
    broken.clip_has_no_min,
    broken.clip_swaps_its_bounds,
    broken.clip_inverts_the_ratio,
    broken.clip_flips_the_advantage,
    broken.clip_applies_the_dual_bound_to_both_signs,
]


@pytest.mark.parametrize("variant", CLIPS, ids=names(CLIPS))
def test_the_clip_table_notices(variant):
    refute(check_clip_table, variant)


def check_clip_values(clipped_surrogate) -> None:
    """-min(r A, clip(r) A): by hand for A = 2 and -2 at r = 0.5, 1, 1.5, and bounded by -c A with a dual clip."""

    def value(ratio, advantage, **options):
        log = torch.tensor([[ratio]], dtype=torch.float64).log()
        advantages = torch.tensor([[advantage]], dtype=torch.float64)
        return clipped_surrogate(log, torch.zeros_like(log), advantages, ON, **CLIP, **options).item()

    expected = {(0.5, 2): -1.0, (1, 2): -2.0, (1.5, 2): -2.4, (0.5, -2): 1.6, (1, -2): 2.0, (1.5, -2): 3.0}
    for (ratio, advantage), loss in expected.items():
        assert value(ratio, advantage) == pytest.approx(loss, abs=1e-12)
    assert value(10, -2) == pytest.approx(20, abs=1e-12) and value(10, -2, dual_clip=3.0) == pytest.approx(6, abs=1e-12)
    assert value(10, 2, dual_clip=3.0) == pytest.approx(-2.4, abs=1e-12)


def test_the_clipped_loss_by_hand():
    check_clip_values(clipped_surrogate)
    for variant in (broken.clip_takes_the_larger_side, broken.clip_is_missing, broken.clip_flips_the_advantage):
        refute(check_clip_values, variant)


def test_the_unclipped_loss_is_minus_ratio_times_advantage():
    """Its slope is A everywhere."""
    for ratio in (0.1, 1.0, 7.0):
        for advantage in (1.0, -1.0):
            assert slope(unclipped_surrogate, ratio, advantage) == pytest.approx(advantage, abs=1e-12)


# --- the first step (D10) ---


def first_step():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 5, (4, 6), generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    advantages = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return logits, logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), advantages, mask


def check_first_step(surrogate) -> None:
    """Before any update the gradient is the policy gradient of -mean(A log pi), and the loss is -mean(A), not that mean."""
    logits, logprobs, advantages, mask = first_step()
    count = mask.sum()
    for options in (CLIP, {"clip_low": 0.1, "clip_high": 0.3}, dict(**CLIP, dual_clip=3.0)):
        loss = weighted_sum(surrogate(logprobs, logprobs.detach(), advantages, mask, **options), mask.double(), count)
        policy_gradient = -(torch.where(mask, advantages, 0.0) * logprobs).sum() / count
        ours, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, policy_gradient))
        torch.testing.assert_close(ours, wanted, **EXACT)
        torch.testing.assert_close(loss, -advantages[mask].mean(), **EXACT)


def test_the_first_gradient_is_the_policy_gradient():
    check_first_step(clipped_surrogate)
    check_first_step(lambda *args, **_: unclipped_surrogate(*args))


@pytest.mark.parametrize(
    "variant",
    [broken.clip_inverts_the_ratio, broken.clip_flips_the_advantage, broken.clip_applies_the_dual_bound_to_both_signs],
)
def test_the_first_step_notices(variant):
    refute(check_first_step, variant)


def test_the_first_step_cannot_notice_which_side_the_clip_takes():
    """All forms agree at ratio 1: this is why the table above is needed as well."""
    check_first_step(broken.clip_takes_the_larger_side)
    check_first_step(broken.clip_is_missing)


# --- the whole language instead of samples (D3) ---


def check_enumerated_gradient(surrogate) -> None:
    """All 15 sentences, each weighted by its probability, advantage R(y) on each token: the exact gradient of E[R]."""
    problem, theta = tree.random_problem(3)
    theta.requires_grad_()
    logprobs = tree.token_logprobs(theta)
    probabilities = tree.sequence_logprobs(theta).exp()
    weight = torch.where(tree.MASK, probabilities.detach().unsqueeze(1), 0.0)
    advantages = problem.rewards.unsqueeze(1).expand(15, 3)
    loss = weighted_sum(surrogate(logprobs, logprobs.detach(), advantages, tree.MASK, **CLIP), weight, 1.0)
    (ours,) = torch.autograd.grad(loss, theta)
    (wanted,) = torch.autograd.grad(tree.expected(theta, problem.rewards), theta)
    torch.testing.assert_close(ours, -wanted, **EXACT)


def test_weighted_by_probability_the_loss_has_the_exact_gradient_of_the_expected_reward():
    check_enumerated_gradient(clipped_surrogate)
    refute(check_enumerated_gradient, broken.clip_inverts_the_ratio)
    refute(check_enumerated_gradient, broken.clip_flips_the_advantage)


# --- masks before exp ---


def check_masked_infinities(surrogate) -> None:
    """A padded token may have any log-prob: the gradient of the others stays what it was."""
    for impossible in (float("-inf"), float("inf"), float("nan"), 1e30):
        logprobs = torch.tensor([[-1.0, impossible]], dtype=torch.float64, requires_grad=True)
        old = torch.tensor([[-1.1, -2.0]], dtype=torch.float64)
        mask = torch.tensor([[True, False]])
        loss = surrogate(logprobs, old, torch.ones_like(old), mask, **CLIP)
        weighted_sum(loss, mask.double(), 1.0).backward()
        assert logprobs.grad[0].tolist() == pytest.approx([-exp(0.1), 0.0], abs=1e-12)


def test_a_masked_infinity_leaves_the_gradient_alone():
    check_masked_infinities(clipped_surrogate)
    check_masked_infinities(lambda *args, **_: unclipped_surrogate(*args))
    refute(check_masked_infinities, broken.clip_masks_after_exp)


def test_a_huge_log_ratio_stays_finite():
    """exp is guarded at 20 nats, where a gradient would be meaningless."""
    logprobs = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = unclipped_surrogate(logprobs, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()
    assert log_ratio(logprobs, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[20.0, -20.0]]


# --- the value loss (A5, D11) ---


def value_gradient(loss, value: float, old: float, target: float, clip: float | None) -> float:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old_values, returns = (torch.tensor([[x]], dtype=torch.float64) for x in (old, target))
    loss(values, old_values, returns, ON, value_clip_range=clip).sum().backward()
    return values.grad.item()


FOUR_CASES = {-0.5: -1.5, 0.1: -0.9, 0.5: 0.0, 2.5: 1.5}
"""V_old = 0, range 0.2, R = 1. V moved away: full gradient; inside the band: full; towards R: none; far past R: full."""


def check_value_clip(clipped_value_loss) -> None:
    for value, gradient in FOUR_CASES.items():
        assert value_gradient(clipped_value_loss, value, 0.0, 1.0, 0.2) == pytest.approx(gradient, abs=1e-12)
        assert value_gradient(clipped_value_loss, -value, 0.0, -1.0, 0.2) == pytest.approx(-gradient, abs=1e-12)


def test_the_value_clip_holds_back_only_what_moved_towards_the_return():
    check_value_clip(clipped_value_loss)


VALUES = [
    broken.value_clip_has_no_max,
    broken.value_clip_takes_the_min,
    broken.value_loss_has_the_wrong_sign,
    broken.value_loss_counts_the_half_twice,
    broken.value_loss_targets_the_old_values,
]


@pytest.mark.parametrize("variant", VALUES, ids=names(VALUES))
def test_the_value_clip_check_notices(variant):
    refute(check_value_clip, variant)


def test_without_the_max_three_of_the_four_cases_are_wrong():
    """The form of Stable-Baselines3, mse without half or max: 0, -1.8, 0, 0."""

    def mse_of_clipped(*args, **kw):
        return 2 * broken.value_clip_has_no_max(*args, **kw)

    gradients = [value_gradient(mse_of_clipped, value, 0.0, 1.0, 0.2) for value in FOUR_CASES]
    assert gradients == pytest.approx([0, -1.8, 0, 0], abs=1e-12)
    wrong = [abs(g - right) > 1e-9 for g, right in zip(gradients, FOUR_CASES.values(), strict=True)]
    assert wrong == [True, True, False, True]


def check_plain_value_loss(clipped_value_loss) -> None:
    """Without a range: 0.5 (V - R)^2, whose gradient is V - R wherever V started."""
    values = torch.tensor([[3.0, 7.0]], dtype=torch.float64, requires_grad=True)
    returns, mask = torch.tensor([[1.0, float("nan")]], dtype=torch.float64), torch.tensor([[True, False]])
    loss = clipped_value_loss(values, torch.zeros(1, 2).double(), returns, mask, value_clip_range=None)
    assert loss[0, 0].item() == pytest.approx(2.0, abs=1e-12)
    loss[0, 0].backward()
    assert values.grad.tolist() == [[2.0, 0.0]]


def test_the_plain_value_loss_is_half_the_squared_error():
    check_plain_value_loss(clipped_value_loss)
    refute(check_plain_value_loss, broken.value_loss_counts_the_half_twice)
    refute(check_plain_value_loss, broken.value_loss_has_the_wrong_sign)


@pytest.mark.parametrize("value_clip_range", [None, 0.2])
def test_masked_values_have_no_gradient_whatever_they_hold(value_clip_range):
    values = torch.tensor([[0.5, float("inf")]], dtype=torch.float64, requires_grad=True)
    nan = torch.tensor([[0.4, float("nan")]], dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    loss = clipped_value_loss(values, nan, nan, mask, value_clip_range=value_clip_range)
    weighted_sum(loss, mask.double(), 1.0).backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.1, 0.0]], dtype=torch.float64), **EXACT)


# --- what is counted as clipped (A3) ---


def check_clipped_elements(clipped_elements) -> None:
    """The event that stops the gradient, not |ratio - 1| > range: 4 of these 8 leave the band, 2 are stopped."""
    ratio = torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0, 1.0, 0.9, 1.1])
    advantages = torch.tensor([1.0, -1.0] * 4)
    low, high = clipped_elements(ratio, advantages, **CLIP)
    assert low.nonzero().flatten().tolist() == [1] and high.nonzero().flatten().tolist() == [2]


def test_the_clip_fraction_counts_elements_without_a_gradient():
    check_clipped_elements(clipped_elements)
    refute(check_clipped_elements, lambda r, a, clip_low, clip_high: (r < 1 - clip_low, r > 1 + clip_high))
    refute(check_clipped_elements, lambda r, a, **bounds: clipped_elements(r, -a, **bounds))
