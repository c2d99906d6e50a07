"""Action distributions: log-probs, entropies, divergences and samples as functions of a tensor of parameters.

Each class is a small frozen description (number of choices, bounds); a network gives the parameters, (..., num_params).
Every method is a few tensor operations without branches on data: it is fast for eight rows, compiles as one graph and
can be differentiated twice. Real-valued results are float32 or wider, whatever the dtype of the parameters.
Sampling inverts the CDF at uniform numbers, so that an action is a function of its draw.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from math import e, log, pi
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from rlhf.core.logprobs import entropy as categorical_entropy
from rlhf.core.random import invert_cdf

MASKED_LOGIT = -1e9
"""The logit of a forbidden choice. Its probability is exactly 0, and unlike -inf it causes no NaN in any gradient."""
_PADDING_LOGIT = -1e18  # of padding choices: probability 0 even if all others are forbidden
_SMALLEST_DRAW = 2.0**-54  # uniform numbers are multiples of 2**-53; at 0 itself the normal quantile is infinite


class Distribution(Protocol):
    """The interface that policies use. `...` stands for any leading dimensions; only `sample` requires (rows, ...)."""

    @property
    def num_params(self) -> int: ...

    @property
    def num_draws(self) -> int:
        """Uniform numbers per action."""
        ...

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: () or (parts,)."""
        ...

    @property
    def is_discrete(self) -> bool:
        """True: actions are int64. False: they are of the parameters' type."""
        ...

    def logprobs(self, params: Tensor, actions: Tensor) -> Tensor:
        """(..., num_params), (..., *action_shape) -> (...), in nats."""
        ...

    def entropy(self, params: Tensor) -> Tensor:
        """(..., num_params) -> (...), in nats."""
        ...

    def kl(self, params: Tensor, other: Tensor) -> Tensor:
        """KL(params || other), exact: (..., num_params) twice -> (...)."""
        ...

    def sample(self, params: Tensor, draws: Tensor) -> Tensor:
        """(rows, num_params) and float64 in [0, 1), (rows, num_draws) -> (rows, *action_shape)."""
        ...

    def mode(self, params: Tensor) -> Tensor:
        """The deterministic action, used instead of a sample: (..., num_params) -> (..., *action_shape)."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of `num_choices`; parameters are logits."""

    num_choices: int
    num_draws = 1
    action_shape = ()
    is_discrete = True

    @property
    def num_params(self) -> int:
        return self.num_choices

    def logprobs(self, params: Tensor, actions: Tensor) -> Tensor:
        return _chosen(params, actions)

    def entropy(self, params: Tensor) -> Tensor:
        return categorical_entropy(params)

    def kl(self, params: Tensor, other: Tensor) -> Tensor:
        return _categorical_kl(params, other)

    def sample(self, params: Tensor, draws: Tensor) -> Tensor:
        return invert_cdf(params, draws.reshape(-1))

    def mode(self, params: Tensor) -> Tensor:
        return params.argmax(-1)


@dataclass(frozen=True)
class MultiCategorical:
    """Several independent choices at once: part i is one of sizes[i]. Parameters are their logits, concatenated."""

    sizes: tuple[int, ...]
    is_discrete = True
    _places: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index of each logit of each part in the parameters; the padding of shorter parts points one past the end."""
        total, widest = sum(self.sizes), max(self.sizes)
        places = []
        for size, end in zip(self.sizes, accumulate(self.sizes), strict=True):
            places += [*range(end - size, end), *[total] * (widest - size)]
        object.__setattr__(self, "_places", tuple(places))

    @property
    def num_params(self) -> int:
        return sum(self.sizes)

    @property
    def num_draws(self) -> int:
        return len(self.sizes)

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (len(self.sizes),)

    def logprobs(self, params: Tensor, actions: Tensor) -> Tensor:
        return _chosen(self._parts(params), actions).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        return categorical_entropy(self._parts(params)).sum(-1)

    def kl(self, params: Tensor, other: Tensor) -> Tensor:
        return _categorical_kl(self._parts(params), self._parts(other)).sum(-1)

    def sample(self, params: Tensor, draws: Tensor) -> Tensor:
        parts = self._parts(params)
        return invert_cdf(parts.flatten(0, 1), draws.reshape(-1)).view(parts.shape[:2])

    def mode(self, params: Tensor) -> Tensor:
        return self._parts(params).argmax(-1)

    def _parts(self, params: Tensor) -> Tensor:
        """(..., num_params) -> (..., parts, largest size): handles all parts at once; shorter ones are padded."""
        parts, widest = len(self.sizes), max(self.sizes)
        if min(self.sizes) == widest:
            return params.unflatten(-1, (parts, widest))
        padded = pad(_wide(params), (0, 1), value=_PADDING_LOGIT)
        return padded.index_select(-1, torch.tensor(self._places, device=params.device)).unflatten(-1, (parts, widest))


@dataclass(frozen=True)
class Gaussian:
    """`dimensions` independent normal variables. Parameters are the means, then the logs of the standard deviations."""

    dimensions: int
    is_discrete = False

    @property
    def num_params(self) -> int:
        return 2 * self.dimensions

    @property
    def num_draws(self) -> int:
        return self.dimensions

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (self.dimensions,)

    def logprobs(self, params: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = self._split(params)
        standard = (actions - mean) * (-log_std).exp()
        return (-0.5 * standard * standard - log_std).sum(-1) - 0.5 * log(2 * pi) * self.dimensions

    def entropy(self, params: Tensor) -> Tensor:
        _, log_std = self._split(params)
        return log_std.sum(-1) + 0.5 * log(2 * pi * e) * self.dimensions

    def kl(self, params: Tensor, other: Tensor) -> Tensor:
        (mean, log_std), (other_mean, other_log_std) = self._split(params), self._split(other)
        log_ratio = log_std - other_log_std
        shift = (mean - other_mean) * (-other_log_std).exp()
        return (0.5 * (torch.expm1(2 * log_ratio) + shift * shift) - log_ratio).sum(-1)

    def sample(self, params: Tensor, draws: Tensor) -> Tensor:
        mean, log_std = self._split(params)
        standard = torch.special.ndtri(draws.reshape(mean.shape).clamp(min=_SMALLEST_DRAW)).to(mean.dtype)
        return mean + log_std.exp() * standard

    def mode(self, params: Tensor) -> Tensor:
        return self._split(params)[0]

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = _wide(params).chunk(2, -1)
        return mean, log_std


@dataclass(frozen=True)
class SquashedGaussian(Gaussian):
    """A Gaussian u seen through a = shift + scale * tanh(u): bounded actions with a density everywhere inside the
    bounds.

    An action is stored as u, which cannot be recovered from a near the bounds. Its log-prob is that of a:
    log N(u) - log |da/du|, with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which is accurate for any u
    (Haarnoja et al. 2018, arXiv 1801.01290, appendix C; 1 - tanh(u)^2 itself rounds to 0 from |u| = 9 on in float32).
    KL divergences are those of u: a change of variable preserves them. `mode` is the mean of u, whose a is the median.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    _log_scale: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not len(self.scale) == len(self.shift) == self.dimensions or min(self.scale) <= 0:
            raise ValueError(
                f"scale {self.scale} and shift {self.shift} must have {self.dimensions} numbers each, and scale above 0"
            )
        object.__setattr__(self, "_log_scale", sum(log(scale) for scale in self.scale))

    def logprobs(self, params: Tensor, actions: Tensor) -> Tensor:
        return super().logprobs(params, actions) - _log_slope(actions).sum(-1) - self._log_scale

    def entropy(self, params: Tensor) -> Tensor:
        """H(u) + E[log |da/du|], the latter by the trapezoid rule over 65 points of u.

        The error falls exponentially as the spacing shrinks. Per dimension it is below 1e-12 for standard deviations up
        to 1, 1e-8 at 2, and 1e-4 at 4, where nearly all probability already lies at the bounds.
        """
        mean, log_std = self._split(params)
        points = torch.linspace(-8.5, 8.5, 65, dtype=mean.dtype, device=mean.device)
        weights = (-0.5 * points * points).softmax(0)
        slopes = _log_slope(mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * points)
        return super().entropy(params) + (slopes * weights).sum((-1, -2)) + self._log_scale


def _wide(params: Tensor) -> Tensor:
    return params if params.dtype == torch.float64 else params.float()


def _chosen(logits: Tensor, actions: Tensor) -> Tensor:
    """`core.logprobs.token_logprobs` for few choices, where the cost of a call matters more than memory."""
    return _wide(logits).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _log_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2), elementwise."""
    return 2.0 * (log(2.0) - u - softplus(-2.0 * u, threshold=50.0))  # torch's default, 20, is off by 2e-9


def _categorical_kl(logits: Tensor, other: Tensor) -> Tensor:
    """sum p log(p / q), (..., choices) -> (...). A choice with p = q = 0 adds 0, one with p > q = 0 very much."""
    lowest = torch.finfo(torch.float32).min / 4  # replaces -inf, since inf - inf is NaN
    logprobs = _wide(logits).log_softmax(-1)
    difference = logprobs.clamp(min=lowest) - _wide(other).log_softmax(-1).clamp(min=lowest)
    return (logprobs.exp() * difference).sum(-1)
