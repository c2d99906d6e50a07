"""Kullback-Leibler divergences in nats: estimators from samples, and adaptive coefficients.

With d = log p(x) - log q(x) and x drawn from p, all of them estimate KL(p || q) (Schulman, "Approximating KL
Divergence", joschu.net/blog/kl-approx.html). Their gradients differ (tests/core/test_kl.py enumerates them):

| estimator       | mean    | as a loss, gradient of the mean | as a reward (detached, times the score function) |
|-----------------|---------|---------------------------------|--------------------------------------------------|
| k1 = d          | KL      | 0: pure noise                   | grad KL(p || q)                                  |
| k2 = d^2 / 2    | biased  | grad KL(p || q)                 | wrong                                            |
| k3 = e^-d-1+d   | KL      | grad KL(q || p), the other one  | grad KL(p || q) - grad KL(q || p): wrong         |
"""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
LossKL = Literal["k2", "k3", "weighted_k3", "sequence_k2", "sequence_k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp(), so that value and gradient stay finite (the gradient is 0 beyond)."""


def kl_estimate(sampler_logprobs: Tensor, other_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(sampler || other) per element, from samples of the sampler. Both log-probs have one shape, any."""
    d = sampler_logprobs - other_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def sequence_kl_estimate(
    sampler_logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, estimator: KLEstimator
) -> Tensor:
    """The estimator applied to the *summed* log-ratio of each row: (rows, time) -> (rows,).

    Only this (k2 as a loss, k1 as a reward with return-to-go) has the gradient of the sequence's KL: a sum of per-token
    losses misses the effect of a token on the divergence of later ones (arXiv 2506.09477).
    """
    log_ratio = torch.where(mask, sampler_logprobs - other_logprobs, 0.0).sum(-1)
    return kl_estimate(log_ratio, torch.zeros_like(log_ratio), estimator)


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, mask: Tensor, estimator: LossKL) -> Tensor:
    """KL to the reference as a differentiable loss per element, (rows, time); 0 where `mask` is False.

    Args:
        ratio: pi / pi_old, with its gradient; only "weighted_k3" uses it.
        estimator: "k2", "k3": the estimate of each token. "weighted_k3": k3 times `ratio`, which has the gradient of
            KL(policy || reference) at sampled prefixes, also off-policy (DeepSeek-V3.2, arXiv 2512.02556).
            "sequence_k2", "sequence_k3": the estimate from the completion's summed log-ratio, spread evenly over its
            tokens.
    """
    if estimator == "sequence_k2" or estimator == "sequence_k3":
        of_row = sequence_kl_estimate(logprobs, ref_logprobs, mask, "k2" if estimator == "sequence_k2" else "k3")
        return mask * (of_row / mask.sum(-1).clamp(min=1)).unsqueeze(1)
    d = torch.where(mask, logprobs - ref_logprobs, 0.0)
    if estimator == "weighted_k3":
        return ratio * kl_estimate(d, torch.zeros_like(d), "k3")
    return kl_estimate(d, torch.zeros_like(d), estimator)


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, num_completions: int, horizon: int) -> float:
    """The coefficient for the next step: kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_completions / horizon).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2 and released code.

    Args:
        kl: Measured KL in nats per completion (the sum over its tokens, averaged over completions).
        target: Target for `kl`, in the same unit.
        num_completions: Number of completions measured; capped at `horizon`.
        horizon: Number of completions over which the coefficient adapts.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(1.0, num_completions / horizon))  # at least 0.8 kl_coef, so never negative


def adaptive_penalty_coef(penalty_coef: float, kl: float, *, target: float, floor: float = 1e-4) -> float:
    """PPO-Penalty's coefficient after a measured KL(old || policy): halved below target / 1.5, doubled above 1.5
    target.

    Schulman et al. 2017, section 4 (arXiv 1707.06347). Halving stops at `floor`, from which doubling can bring it back.
    """
    if kl < target / 1.5:
        return max(penalty_coef / 2, min(penalty_coef, floor))
    return penalty_coef * 2 if kl > 1.5 * target else penalty_coef
