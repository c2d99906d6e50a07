"""Masked reductions. An injected `all_sum` makes sums and counts global, so that no result depends on how rows are
spread over processes."""

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
"""Adds a tensor over all processes; the identity if there is one."""


def local_sum(values: Tensor) -> Tensor:
    return values


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; other elements are ignored, even NaN."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor, all_sum: AllSum = local_sum) -> Tensor:
    """Mean of `values` where `mask`, over all processes; 0 if the mask is False everywhere."""
    total, count = all_sum(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, all_sum: AllSum = local_sum, eps: float = 1e-8
) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over the masked elements of all processes; 0 where `mask` is False.

    The variance divides by the count (ddof 0). Ziegler et al. 2019 (arXiv 1909.08593), released code.

    Args:
        shift_mean: False adds the mean back: for rewards, whose sign has a meaning; never for advantages.
        all_sum: Adds over processes.
    """
    mean = masked_mean(values, mask, all_sum)
    variance = masked_mean((values - mean) ** 2, mask, all_sum)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def weighted_sum(values: Tensor, weight: Tensor, denominator: Tensor | float) -> Tensor:
    """sum(values * weight) / denominator: the reduction that all losses use.

    `denominator` is global (the whole optimizer step, all processes), so that the result does not depend on how the
    rows are split into microbatches. Elements of weight 0 are set to 0 before multiplying, so a NaN there is harmless.
    """
    return (torch.where(weight != 0, values, 0.0) * weight).sum() / denominator
