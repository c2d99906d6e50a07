"""The core functions, each broken in exactly one named way.

tests/core checks that its expectations fail on them, tests/test_mutants.py that short runs do. A function's name says what
is wrong with it. They wrap the real function where they can, so that nothing else differs.
"""

import torch
from torch import Tensor

from rlhf.core.advantages import gae
from rlhf.core.kl import adaptive_kl_coef, kl_estimate
from rlhf.core.logprobs import entropy, token_logprobs
from rlhf.core.losses import clipped_surrogate, clipped_value_loss, unclipped_surrogate
from rlhf.core.masking import weighted_sum, whiten

# gae(rewards, values, next_values, terminated, episode_ends, mask, *, gamma, gae_lambda)


def gae_swaps_its_masks(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, next_values, episode_ends, terminated, mask, **kw)


def gae_takes_truncation_for_termination(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, next_values, episode_ends, episode_ends, mask, **kw)


def gae_ignores_episode_ends(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, next_values, terminated, torch.zeros_like(episode_ends), mask, **kw)


def gae_cuts_only_at_terminations(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, next_values, terminated, terminated, mask, **kw)


def gae_bootstraps_after_terminations(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, next_values, torch.zeros_like(terminated), episode_ends, mask, **kw)


def gae_bootstraps_from_the_same_state(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    return gae(rewards, values, values, terminated, episode_ends, mask, **kw)


def gae_counts_what_is_masked(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    """Padding, tool tokens and ghost steps are treated as steps."""
    return gae(rewards, values, next_values, terminated, episode_ends, torch.ones_like(mask), **kw)


def gae_zeroes_holes_instead_of_passing_over_them(rewards, values, next_values, terminated, episode_ends, mask, **kw):
    """The rule of trainers that multiply rewards and values by the mask and then run the recursion over every position."""
    zeroed = torch.where(mask, values, 0.0)
    after = torch.cat([zeroed[:, 1:], torch.zeros_like(zeroed[:, :1])], 1)
    everything = torch.ones_like(mask)
    return gae(torch.where(mask, rewards, 0.0), zeroed, after, terminated, episode_ends, everything, **kw)


def gae_forgets_lambda(rewards, values, next_values, terminated, episode_ends, mask, *, gamma, gae_lambda):
    return gae(rewards, values, next_values, terminated, episode_ends, mask, gamma=gamma, gae_lambda=1.0)


def gae_has_the_wrong_sign(*args, **kw):
    advantages, returns = gae(*args, **kw)
    return -advantages, returns


def gae_returns_advantages_as_returns(*args, **kw):
    advantages, _ = gae(*args, **kw)
    return advantages, advantages


# whiten(values, mask, *, shift_mean, all_sum, eps)


def whiten_adds_the_mean_back(values, mask, *, shift_mean=True, **kw):
    return whiten(values, mask, shift_mean=False, **kw)


def whiten_ignores_the_mask(values, mask, **kw):
    return torch.where(mask, whiten(values, torch.ones_like(mask), **kw), 0.0)


def whiten_divides_by_count_minus_one(values, mask, *, shift_mean=True, **kw):
    count = mask.sum()
    mean = torch.where(mask, values, 0.0).sum() / count
    scaled = whiten(values, mask, **kw) * ((count - 1) / count).sqrt()
    return torch.where(mask, scaled + (0.0 if shift_mean else mean), 0.0)


def whiten_leaves_masked_elements(values, mask, **kw):
    return torch.where(mask, whiten(values, mask, **kw), values)


# weighted_sum(values, weight, denominator)


def weighted_sum_ignores_the_weights(values, weight, denominator):
    return weighted_sum(values, torch.ones_like(weight), denominator)


def weighted_sum_multiplies_before_excluding(values, weight, denominator):
    return (values * weight).sum() / denominator


def weighted_sum_averages_its_own_elements(values, weight, denominator):
    """The mean of the microbatch: what it holds decides how much each element weighs."""
    return weighted_sum(values, weight, weight.sum())


# clipped_surrogate(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip)


def clip_takes_the_larger_side(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low, clip_high, dual_clip=None
) -> Tensor:
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return -torch.max(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clip_is_missing(logprobs, old_logprobs, advantages, mask, **_):
    return unclipped_surrogate(logprobs, old_logprobs, advantages, mask)


def clip_has_no_min(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip=None):
    """Only the clipped product: the gradient also vanishes where the ratio moved the wrong way."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages


def clip_swaps_its_bounds(*args, clip_low, clip_high, dual_clip=None):
    return clipped_surrogate(*args, clip_low=clip_high, clip_high=clip_low, dual_clip=dual_clip)


def clip_inverts_the_ratio(logprobs, old_logprobs, advantages, mask, **kw):
    return clipped_surrogate(old_logprobs, logprobs, advantages, mask, **kw)


def clip_flips_the_advantage(logprobs, old_logprobs, advantages, mask, **kw):
    return clipped_surrogate(logprobs, old_logprobs, -advantages, mask, **kw)


def clip_masks_after_exp(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip=None):
    """Finite loss, NaN gradient: 0 * inf in the backward pass."""
    ratio = torch.where(mask, (logprobs - old_logprobs).exp(), 1.0)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clip_applies_the_dual_bound_to_both_signs(*args, clip_low, clip_high, dual_clip=None):
    objective = -clipped_surrogate(*args, clip_low=clip_low, clip_high=clip_high)
    return -objective if dual_clip is None else -torch.max(objective, dual_clip * args[2])


def unclipped_has_the_wrong_sign(*args):
    return -unclipped_surrogate(*args)


# clipped_value_loss(values, old_values, returns, mask, *, value_clip_range)


def value_clip_has_no_max(values, old_values, returns, mask, *, value_clip_range):
    if value_clip_range is None:
        return clipped_value_loss(values, old_values, returns, mask, value_clip_range=None)
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return 0.5 * torch.where(mask, near - returns, 0.0) ** 2


def value_clip_takes_the_min(values, old_values, returns, mask, *, value_clip_range):
    plain = clipped_value_loss(values, old_values, returns, mask, value_clip_range=None)
    near = value_clip_has_no_max(values, old_values, returns, mask, value_clip_range=value_clip_range)
    return torch.min(plain, near)


def value_loss_has_the_wrong_sign(*args, **kw):
    return -clipped_value_loss(*args, **kw)


def value_loss_counts_the_half_twice(*args, **kw):
    return 0.5 * clipped_value_loss(*args, **kw)


def value_loss_targets_the_old_values(values, old_values, returns, mask, **kw):
    return clipped_value_loss(values, old_values, old_values, mask, **kw)


# kl_estimate(sampler_logprobs, other_logprobs, estimator), adaptive_kl_coef(kl_coef, kl, *, target, ...)


def kl_has_the_wrong_sign(sampler, other, estimator):
    return -kl_estimate(sampler, other, estimator)


def kl_swaps_its_arguments(sampler, other, estimator):
    return kl_estimate(other, sampler, estimator)


def kl_k3_takes_the_place_of_k1(sampler, other, estimator):
    return kl_estimate(sampler, other, {"k1": "k3", "k2": "k2", "k3": "k1"}[estimator])


def kl_k2_takes_the_place_of_k1(sampler, other, estimator):
    return kl_estimate(sampler, other, {"k1": "k2", "k2": "k1", "k3": "k3"}[estimator])


def kl_is_zero(sampler, other, estimator):
    return 0 * kl_estimate(sampler, other, estimator)


def kl_coef_adapts_the_wrong_way(kl_coef, kl, *, target, num_completions, horizon):
    return adaptive_kl_coef(kl_coef, 2 * target - kl, target=target, num_completions=num_completions, horizon=horizon)


def kl_coef_never_adapts(kl_coef, kl, **_):
    return kl_coef


# token_logprobs(logits, tokens, *, temperature), entropy(logits, *, temperature)


def logprobs_ignore_the_temperature(logits, tokens, *, temperature=1.0):
    return token_logprobs(logits, tokens)


def logprobs_multiply_by_the_temperature(logits, tokens, *, temperature=1.0):
    return token_logprobs(logits, tokens, temperature=1 / temperature)


def logprobs_are_of_the_next_token(logits, tokens, *, temperature=1.0):
    return token_logprobs(logits, tokens.roll(-1, -1), temperature=temperature)


def logprobs_are_not_normalised(logits, tokens, *, temperature=1.0):
    return (logits / temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_has_the_wrong_sign(logits, *, temperature=1.0):
    return -entropy(logits, temperature=temperature)


def entropy_ignores_the_temperature(logits, *, temperature=1.0):
    return entropy(logits)


def entropy_is_nan_at_probability_zero(logits, *, temperature=1.0):
    logprobs = (logits / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
