"""KL estimators by enumeration: their means, their gradients as a loss and as a reward."""

from math import log

import pytest
import torch

from rlhf.core.kl import MAX_LOG_RATIO, adaptive_kl_coef, kl_estimate, sequence_kl_estimate
from tests import broken, tree
from tests.controls import names, refute

EXACT = {"rtol": 0, "atol": 1e-12}
POLICY, OTHER = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
# KL(policy || other) by hand: 0.7 log(7/3) + 0.2 log(2/3) + 0.1 log(1/4)
KL_OF_EXAMPLE = 0.7 * log(7 / 3) + 0.2 * log(2 / 3) + 0.1 * log(1 / 4)
REVERSED_KL = 0.3 * log(3 / 7) + 0.3 * log(3 / 2) + 0.4 * log(4)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions over five outcomes; the first one's logits want a gradient."""
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return p.requires_grad_(), q


def gradient(scalar: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(scalar, theta, retain_graph=True)[0]


def exact_kl_gradients(theta, q) -> tuple[torch.Tensor, torch.Tensor]:
    """grad KL(p || q) and grad KL(q || p), from the definitions."""
    p, logq = theta.log_softmax(-1), q.log_softmax(-1)
    forward = gradient((logq.exp() * (logq - p)).sum(), theta)
    return gradient((p.exp() * (p - logq)).sum(), theta), forward


# --- values (D4) ---


def check_means(kl_estimate) -> None:
    """k1 and k3 average to KL(sampler || other) over the sampler; k2 to another number, half the mean squared log-ratio."""
    for estimator in ("k1", "k3"):
        mean = (POLICY * kl_estimate(POLICY.log(), OTHER.log(), estimator)).sum()
        torch.testing.assert_close(mean.item(), KL_OF_EXAMPLE, **EXACT)
    mean = (POLICY * kl_estimate(POLICY.log(), OTHER.log(), "k2")).sum()
    half_square = 0.5 * (0.7 * log(7 / 3) ** 2 + 0.2 * log(2 / 3) ** 2 + 0.1 * log(1 / 4) ** 2)
    torch.testing.assert_close(mean.item(), half_square, **EXACT)


def test_k1_and_k3_average_to_the_exact_kl_when_the_sampler_samples():
    check_means(kl_estimate)


ESTIMATES = [
    broken.kl_has_the_wrong_sign,
    broken.kl_swaps_its_arguments,
    broken.kl_k3_takes_the_place_of_k1,
    broken.kl_k2_takes_the_place_of_k1,
    broken.kl_is_zero,
]


@pytest.mark.parametrize("variant", [v for v in ESTIMATES if v is not broken.kl_k3_takes_the_place_of_k1])
def test_the_check_of_means_notices(variant):
    refute(check_means, variant)


def test_the_two_directions_differ_in_the_example():
    """Otherwise the check above could not tell swapped arguments."""
    assert abs(KL_OF_EXAMPLE - REVERSED_KL) > 0.03


def test_k3_is_never_negative_and_k1_is():
    d = torch.linspace(-3, 3, 101).double()
    zero = torch.zeros_like(d)
    assert (kl_estimate(d, zero, "k3") >= 0).all() and (kl_estimate(d, zero, "k1") < 0).any()


def test_k3_stays_exact_for_tiny_log_ratios_and_finite_for_huge_ones():
    """k3 = d^2 / 2 - d^3 / 6 + ...; exp(-d) - 1 + d in float32 would be 0 or noise at d = 1e-4."""
    assert kl_estimate(torch.tensor(1e-4), torch.tensor(0.0), "k3").item() == pytest.approx(0.5e-8, rel=0.02)
    huge = kl_estimate(torch.tensor([-1e6, 1e6]), torch.zeros(2), "k3")
    assert huge.isfinite().all() and huge[1] == MAX_LOG_RATIO - 1


def test_an_unknown_estimator_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# --- gradients (D4) ---


def check_loss_gradients(kl_estimate) -> None:
    """Differentiate the estimator at each outcome and average over the sampler."""
    theta, q = logits()
    reverse, forward = exact_kl_gradients(theta, q)
    p = theta.log_softmax(-1)
    weight = p.exp().detach()

    def as_loss(estimator):
        return gradient((weight * kl_estimate(p, q.log_softmax(-1), estimator)).sum(), theta)

    torch.testing.assert_close(as_loss("k1"), torch.zeros(5).double(), **EXACT)
    torch.testing.assert_close(as_loss("k2"), reverse, **EXACT)
    torch.testing.assert_close(as_loss("k3"), forward, **EXACT)
    assert (as_loss("k3") - reverse).abs().max() > 0.03  # k3 as a loss is not the KL it estimates


def test_as_a_loss_k1_is_noise_k2_gives_the_kl_and_k3_the_other_kl():
    check_loss_gradients(kl_estimate)


@pytest.mark.parametrize("variant", ESTIMATES, ids=names(ESTIMATES))
def test_the_check_of_loss_gradients_notices(variant):
    refute(check_loss_gradients, variant)


def check_reward_gradients(kl_estimate) -> None:
    """Detach the estimator and multiply it with the score function: the policy gradient of a KL penalty in the reward."""
    theta, q = logits()
    reverse, forward = exact_kl_gradients(theta, q)
    p = theta.log_softmax(-1)

    def as_reward(estimator):
        penalty = kl_estimate(p, q.log_softmax(-1), estimator).detach()
        return gradient((p.exp().detach() * penalty * p).sum(), theta)

    torch.testing.assert_close(as_reward("k1"), reverse, **EXACT)
    torch.testing.assert_close(as_reward("k3"), reverse - forward, **EXACT)
    assert (as_reward("k2") - reverse).abs().max() > 0.03


def test_as_a_reward_only_k1_gives_the_gradient_of_the_kl():
    check_reward_gradients(kl_estimate)


@pytest.mark.parametrize("variant", ESTIMATES, ids=names(ESTIMATES))
def test_the_check_of_reward_gradients_notices(variant):
    refute(check_reward_gradients, variant)


def test_ratio_times_k3_gives_the_gradient_of_the_kl_from_samples_of_any_policy():
    """The ratio must carry gradient: with it detached, the forward KL comes back."""
    theta, q = logits()
    reverse, forward = exact_kl_gradients(theta, q)
    p, old = theta.log_softmax(-1), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)
    ratio = (p - old.log()).exp()
    k3 = kl_estimate(p, q.log_softmax(-1), "k3")
    torch.testing.assert_close(gradient((old * ratio * k3).sum(), theta), reverse, **EXACT)
    torch.testing.assert_close(gradient((old * ratio.detach() * k3).sum(), theta), forward, **EXACT)


# --- sequences (D5), on the tree of 15 sentences ---


def sequence_setting():
    problem, theta = tree.random_problem(2)
    theta.requires_grad_()
    exact = tree.kl(tree.sequence_logprobs(theta), tree.sequence_logprobs(problem.reference))
    return theta, tree.token_logprobs(theta), tree.token_logprobs(problem.reference), exact


def test_the_sum_of_token_k3_averages_to_the_kl_of_sequences():
    theta, logprobs, reference, exact = sequence_setting()
    k3 = torch.where(tree.MASK, kl_estimate(logprobs, reference, "k3"), 0.0)
    torch.testing.assert_close(tree.expected(theta, k3.sum(-1)), exact, **EXACT)


def check_sequence_estimator(sequence_kl_estimate) -> None:
    """Of the summed log-ratio, whatever the padding holds: mean k1 = KL; k2 as a loss has its gradient."""
    theta, logprobs, reference, exact = sequence_setting()
    probabilities = tree.sequence_logprobs(theta).exp().detach()
    padded = torch.where(tree.MASK, logprobs, 5.0)
    k1 = sequence_kl_estimate(padded, reference, tree.MASK, "k1")
    assert k1.shape == (15,)
    torch.testing.assert_close((probabilities * k1).sum(), exact, **EXACT)
    k2 = sequence_kl_estimate(padded, reference, tree.MASK, "k2")
    wanted = gradient(exact, theta)
    torch.testing.assert_close(gradient((probabilities * k2).sum(), theta), wanted, **EXACT)


def test_k2_of_the_summed_log_ratio_has_the_gradient_of_the_sequences_kl():
    check_sequence_estimator(sequence_kl_estimate)


def sum_of_token_estimates(sampler, other, mask, estimator):
    return torch.where(mask, kl_estimate(sampler, other, estimator), 0.0).sum(-1)


def estimate_that_ignores_the_mask(sampler, other, mask, estimator):
    return sequence_kl_estimate(sampler, other, torch.ones_like(mask), estimator)


def estimate_with_swapped_arguments(sampler, other, mask, estimator):
    return sequence_kl_estimate(other, sampler, mask, estimator)


@pytest.mark.parametrize(
    "variant", [sum_of_token_estimates, estimate_that_ignores_the_mask, estimate_with_swapped_arguments]
)
def test_the_check_of_sequences_notices(variant):
    refute(check_sequence_estimator, variant)


def check_return_to_go(to_go) -> None:
    """k1 in the reward has the gradient of the sequences' KL if every token answers for the penalties that follow it."""
    theta, logprobs, reference, exact = sequence_setting()
    k1 = torch.where(tree.MASK, kl_estimate(logprobs, reference, "k1"), 0.0).detach()
    probabilities = tree.sequence_logprobs(theta).exp().detach()
    surrogate = (probabilities * (to_go(k1) * logprobs).sum(-1)).sum()
    torch.testing.assert_close(gradient(surrogate, theta), gradient(exact, theta), **EXACT)


def test_k1_in_the_reward_with_return_to_go_has_the_gradient_of_the_sequences_kl():
    check_return_to_go(lambda k1: k1.flip(-1).cumsum(-1).flip(-1))
    refute(check_return_to_go, lambda k1: k1)  # each token only its own penalty
    refute(check_return_to_go, lambda k1: -k1.flip(-1).cumsum(-1).flip(-1))


def test_token_losses_lack_the_effect_of_a_token_on_later_divergence():
    """k2 per token and the KL over the vocabulary at every visited prefix have one gradient, and it is not grad KL."""
    theta, logprobs, reference, exact = sequence_setting()
    probabilities = tree.sequence_logprobs(theta).exp().detach()
    k2 = torch.where(tree.MASK, kl_estimate(logprobs, reference, "k2"), 0.0)
    by_token = gradient((probabilities.unsqueeze(1) * k2).sum(), theta)
    p, q = theta.log_softmax(-1), tree.random_problem(2)[0].reference.log_softmax(-1)
    visits = (
        torch.zeros(7)
        .double()
        .index_add(0, tree.STATES[tree.MASK], probabilities.unsqueeze(1).expand(15, 3)[tree.MASK])
    )
    by_vocabulary = gradient((visits * (p.exp() * (p - q)).sum(-1)).sum(), theta)
    torch.testing.assert_close(by_token, by_vocabulary, **EXACT)
    assert (by_token - gradient(exact, theta)).abs().max() > 0.05


# --- the adaptive coefficient (D23) ---


def check_controller(adaptive_kl_coef) -> None:
    """Ziegler: 0.2 * (1 + clip(12 / 6 - 1, +-0.2) * 256 / 10000) = 0.2 * (1 + 0.2 * 0.0256) = 0.201024."""
    setting = {"target": 6.0, "num_completions": 256, "horizon": 10_000}
    assert adaptive_kl_coef(0.2, 12.0, **setting) == pytest.approx(0.201024, abs=1e-12)
    assert adaptive_kl_coef(0.2, 6.0, **setting) == pytest.approx(0.2, abs=1e-12)
    assert adaptive_kl_coef(0.2, 6.6, **setting) == pytest.approx(0.2 * (1 + 0.1 * 0.0256), abs=1e-12)
    assert adaptive_kl_coef(0.2, 0.0, **setting) == pytest.approx(0.2 * (1 - 0.2 * 0.0256), abs=1e-12)


def test_zieglers_controller_moves_by_the_clipped_relative_error():
    check_controller(adaptive_kl_coef)


@pytest.mark.parametrize("variant", [broken.kl_coef_adapts_the_wrong_way, broken.kl_coef_never_adapts])
def test_the_check_of_the_controller_notices(variant):
    refute(check_controller, variant)
