"""Policy optimisation without a value model: the scores of a prompt's group of completions are the baseline.

GRPO (Shao et al. 2024, arXiv 2402.03300) and its relatives differ in a few choices: the baseline of a score, its scale,
the ratio that weighs a token, how the gain is limited, how losses are averaged, where the KL to the reference enters.
Each choice is a setting here; `GRPOConfig.preset` gives the combinations that papers published.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.algorithms.base import Algorithm, Loss, State
from rlhf.algorithms.presets import PRESETS
from rlhf.core.advantages import equal_groups, group_advantages, return_to_go
from rlhf.core.kl import LossKL, kl_estimate, kl_loss
from rlhf.core.losses import (
    clipped_elements,
    clipped_surrogate,
    clipped_weight_surrogate,
    log_ratio,
    score_surrogate,
    sequence_log_ratio,
    unclipped_surrogate,
)
from rlhf.core.masking import AllSum, masked_sum, weighted_sum, whiten
from rlhf.errors import InputError
from rlhf.settings import check_types
from rlhf.types import PolicyOutputs, TrainingBatch, Trajectories, Weighting


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """GRPO's settings. `GRPOConfig.preset(name, **changes)` starts from a published recipe instead of the defaults."""

    completions_per_prompt: int = 8
    """Size of a group: completions sampled for each prompt."""
    center: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    """Baseline subtracted from a score: the mean of its group, the mean of the rest of the group (RLOO), or none."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divisor of the centred score: the standard deviation of the group's scores (gives more weight to prompts that are
    nearly solved or nearly hopeless), that of all scores of the step, or nothing (Dr. GRPO)."""
    std_ddof: Literal[0, 1] = 0
    """The variance behind the standard deviation divides by n - this. TRL, verl and OpenRLHF use 1."""
    std_eps: float = 1e-6
    """Added to the standard deviation."""
    whiten_tokens: bool = False
    """Also whiten the resulting advantages over all tokens of the step (REINFORCE++)."""
    ratio: Literal["token", "sequence_mean", "sequence"] = "token"
    """pi / pi_old of each token; of the whole completion, to the power 1 / length (GSPO); or of the whole completion."""
    surrogate: Literal["clipped", "clipped_weight", "unclipped", "score"] = "clipped"
    """Policy objective. "clipped": min(r A, clip(r) A). "clipped_weight": clip(r) A log pi with the weight clip(r)
    detached (CISPO). "unclipped": r A. "score": A log pi (one update per rollout)."""
    clip_range: float = 0.2
    """Lower bound of the clip is 1 - this; 1 or more: no lower bound."""
    clip_range_high: float | None = None
    """Upper bound of the clip is 1 + this; null: the same as clip_range."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage by this many times its size (usual: 3); off if null."""
    aggregation: Literal["sequence_mean", "token_mean", "group_token_mean", "constant_length"] = "sequence_mean"
    """How token losses are averaged. "sequence_mean": mean over completions of their token means (GRPO). "token_mean":
    mean over all tokens of the optimizer step. "group_token_mean": mean over groups of their token means (DAPO's
    eq. 8). "constant_length": mean over completions of their token sums / constant_length (Dr. GRPO)."""
    constant_length: int | None = None
    """Number of tokens that aggregation "constant_length" divides by; null: generation.max_new_tokens. 1 gives the sum
    over tokens (RLOO)."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference), per nat; 0 needs no reference policy."""
    kl_placement: Literal["loss", "score", "return_to_go"] = "loss"
    """Where the KL enters. "loss": as a term of the loss. "score": its sum over the completion is subtracted from the
    score before centring (RLOO). "return_to_go": its sum from each token on is subtracted from the token's advantage
    (REINFORCE++)."""
    kl_estimator: LossKL = "k3"
    """For kl_placement "loss": k2 or k3 of each token, "weighted_k3" (k3 times the ratio), or "sequence_k2" or
    "sequence_k3" of the whole completion. The other placements always use k1, which is correct there. The README says
    what training converges to with each."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    mask_truncated: bool = False
    """Completions cut by the length limit get no gradient; they still count in the averages."""
    overlong_buffer_tokens: int = 0
    """The score falls by up to 1 over this many tokens before generation.max_new_tokens (DAPO, eq. 13); 0: off."""
    dynamic_sampling_rounds: int = 1
    """Sample up to this many rounds, until the verdicts within each group differ (DAPO); 1: take every group."""
    dynamic_sampling_reward: str | None = None
    """Name of the reward function whose scores are the verdicts; null: the first one."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"grpo.{name} must be {least} or more, got {value}.")
        for name in ("clip_range", "clip_range_high", "std_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"grpo.{name} must be above 0, got {value}.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise InputError(f"grpo.dual_clip must be above 1, or null for off, got {self.dual_clip}.")
        grouped = self.center != "none" or self.scale == "group_std" or self.dynamic_sampling_rounds > 1
        if self.completions_per_prompt < 2 and grouped:
            raise InputError(
                f"grpo.completions_per_prompt={self.completions_per_prompt}: a group of one has no other "
                "completion to compare with. Use at least 2, or set center to none, scale to none or batch_std, and "
                "dynamic_sampling_rounds to 1 (one round)."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GRPOConfig":
        """The settings published as `name`, with `changes` applied."""
        if name not in PRESETS:
            raise InputError(f"preset={name!r} is unknown. Choose one of {', '.join(PRESETS)}.")
        return cls(**PRESETS[name] | changes)

    def with_length(self, max_new_tokens: int) -> "GRPOConfig":
        """The settings with `constant_length` filled in, if it is null."""
        return self if self.constant_length is not None else replace(self, constant_length=max_new_tokens)


_AT_LEAST = {
    "completions_per_prompt": 1,
    "constant_length": 1,
    "kl_coef": 0,
    "entropy_coef": 0,
    "overlong_buffer_tokens": 0,
    "dynamic_sampling_rounds": 1,
}


class GRPO(Algorithm):
    """Scores -> advantages relative to the group -> policy loss (+ kl_coef * KL - entropy_coef * entropy)."""

    def __init__(self, config: GRPOConfig | None = None) -> None:
        self.config = config = config or GRPOConfig()
        if config.aggregation == "constant_length" and config.constant_length is None:
            raise InputError("grpo.constant_length is null: set it to the number of tokens to divide by.")
        self.completions_per_prompt = config.completions_per_prompt
        needs = {"reference": config.kl_coef > 0, "entropy": config.entropy_coef > 0}
        self.needs = frozenset(name for name, needed in needs.items() if needed)

    def advantages(self, rewards: Tensor, trajectories: Trajectories, all_sum: AllSum) -> tuple[Tensor, None]:
        """The advantage of each completion's score relative to its group, the same for all tokens of the completion."""
        config = self.config
        of_row = group_advantages(
            _scores(rewards, trajectories.mask),
            config.completions_per_prompt,
            center=config.center,
            scale=config.scale,
            std_ddof=config.std_ddof,
            std_eps=config.std_eps,
            scored=trajectories.scored,
            all_sum=all_sum,
        )
        return torch.where(trajectories.mask, of_row.unsqueeze(1), 0.0), None

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Advantages of all tokens, and each token's weight in the loss. Rows of one group must be adjacent."""
        config = self.config
        mask = trajectories.mask
        old = trajectories.old_logprobs
        rewards = trajectories.rewards
        kl = torch.zeros_like(old)
        metrics = {"zero_variance_fraction": self._zero_variance(rewards, trajectories, all_sum)}
        if trajectories.ref_logprobs is not None:
            kl = torch.where(mask, kl_estimate(old, trajectories.ref_logprobs, "k1"), 0.0)
            metrics |= {"reward_kl": _mean(kl.sum(-1), all_sum), "kl_coef": config.kl_coef}
        if config.kl_placement == "score":
            penalty = (config.kl_coef * kl.sum(-1)).unsqueeze(1)
            rewards = rewards - torch.where(trajectories.episode_ends & mask, penalty, 0.0)  # where the score is
        advantages, _ = self.advantages(rewards, trajectories, all_sum)
        if config.kl_placement == "return_to_go":
            advantages = advantages - config.kl_coef * return_to_go(kl, mask)
        learns = mask & ~self._left_out(trajectories).unsqueeze(1)
        if config.whiten_tokens:
            advantages = whiten(advantages, learns, all_sum=all_sum)
        if trajectories.scored is not None:
            advantages = torch.where(trajectories.scored.unsqueeze(1), advantages, 0.0)
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        weighting = self._weighting(mask, learns, old.dtype)
        return trajectories.batch(
            advantages=advantages,
            weightings={"policy": weighting, "entropy": weighting},
            coefficients={"clip_low": config.clip_range, "clip_high": high},
            metrics=metrics,
        )

    def _zero_variance(self, rewards: Tensor, trajectories: Trajectories, all_sum: AllSum) -> float:
        """Share of groups whose scores are all equal."""
        scores = _scores(rewards, trajectories.mask)
        equal = equal_groups(scores, self.config.completions_per_prompt, trajectories.scored)
        return _mean(equal.to(scores.dtype), all_sum)

    def _left_out(self, trajectories: Trajectories) -> Tensor:
        """(rows,) bool: completions that get no gradient: those without a score and, with mask_truncated, those cut."""
        left_out = torch.zeros_like(trajectories.row_index, dtype=torch.bool)
        if trajectories.scored is not None:
            left_out |= ~trajectories.scored
        if self.config.mask_truncated:
            left_out |= (trajectories.episode_ends & ~trajectories.terminated & trajectories.mask).any(-1)
        return left_out

    def _weighting(self, mask: Tensor, learns: Tensor, dtype: torch.dtype) -> Weighting:
        """The weight of each token, and each row's contribution to the denominator. Completions that are left out still
        contribute, so that the others do not weigh more."""
        lengths = mask.sum(-1).to(dtype)
        ones = torch.ones_like(lengths)
        if self.config.aggregation == "token_mean":
            divisor, count = ones, lengths
        elif self.config.aggregation == "sequence_mean":
            divisor, count = lengths, ones
        elif self.config.aggregation == "constant_length":
            divisor, count = ones * float(self.config.constant_length or 1), ones
        else:
            size = self.config.completions_per_prompt
            divisor, count = lengths.view(-1, size).sum(1).repeat_interleave(size), ones / size
        return Weighting(torch.where(learns, 1 / divisor.clamp(min=1).unsqueeze(1), 0.0).to(dtype), count)

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Loss:
        """One microbatch's share of the loss, over the minibatch's global denominators."""
        config = self.config
        mask = batch.mask
        token_ratios = log_ratio(outputs.logprobs, batch.old_logprobs, mask)
        ratios = token_ratios
        if config.ratio != "token":
            ratios = sequence_log_ratio(token_ratios, mask, mean=config.ratio == "sequence_mean")
        terms = {"policy": self._policy_loss(outputs.logprobs, ratios, batch)}
        coefficients: dict[str, float] = {}
        if config.kl_coef > 0 and config.kl_placement == "loss":
            assert batch.ref_logprobs is not None
            terms["kl"] = kl_loss(outputs.logprobs, batch.ref_logprobs, ratios.exp(), mask, config.kl_estimator)
            coefficients["kl"] = config.kl_coef
        if outputs.entropy is not None:
            terms["entropy"] = outputs.entropy
            coefficients["entropy"] = -config.entropy_coef
        weighting, denominator = batch.weightings["policy"], batch.denominators["policy"]
        parts = {name: weighted_sum(term, weighting.weight, denominator) for name, term in terms.items()}
        total = parts["policy"]
        for name, coefficient in coefficients.items():
            total = total + coefficient * parts[name]
        return self._report(total, token_ratios, ratios, parts, batch)

    def _policy_loss(self, logprobs: Tensor, ratios: Tensor, batch: TrainingBatch) -> Tensor:
        config = self.config
        mask = batch.mask
        advantages = batch.advantages
        bounds = {"clip_low": batch.coefficients["clip_low"], "clip_high": batch.coefficients["clip_high"]}
        if config.surrogate == "score":
            return score_surrogate(logprobs, advantages, mask)
        if config.surrogate == "clipped_weight":
            return clipped_weight_surrogate(logprobs, ratios, advantages, mask, **bounds)
        none = torch.zeros_like(ratios)
        if config.surrogate == "unclipped":
            loss = unclipped_surrogate(ratios, none, advantages, mask)
        else:
            loss = clipped_surrogate(ratios, none, advantages, mask, **bounds, dual_clip=config.dual_clip)
        # Each token holds the loss of the whole completion, so it is divided by the number of tokens.
        return loss / mask.sum(-1, keepdim=True).clamp(min=1) if config.ratio == "sequence" else loss

    @torch.no_grad()
    def _report(
        self, total: Tensor, token_ratios: Tensor, ratios: Tensor, parts: dict[str, Tensor], batch: TrainingBatch
    ) -> Loss:
        """The loss and its metrics: means over tokens, and each term with its share of the denominator."""
        learns = batch.weightings["policy"].weight != 0
        count = learns.sum()
        bounds = {"clip_low": batch.coefficients["clip_low"], "clip_high": batch.coefficients["clip_high"]}
        low, high = clipped_elements(ratios.exp(), batch.advantages, **bounds)
        k3 = kl_estimate(-token_ratios, torch.zeros_like(token_ratios), "k3")  # samples of the old policy
        of_tokens = {
            "policy_kl": k3,
            "policy_kl_k1": -token_ratios,
            "clip_fraction_low": low.to(k3.dtype),
            "clip_fraction_high": high.to(k3.dtype),
        }
        terms = {name: (masked_sum(values, learns), count) for name, values in of_tokens.items()}
        share = batch.weightings["policy"].count.sum() / batch.denominators["policy"]
        for name, part in parts.items():
            terms["entropy" if name == "entropy" else f"{name}_loss"] = (part, share)
        return Loss(total, terms, terms.pop("policy_kl"))


def _scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """The score of each completion, (rows,)."""
    return torch.where(mask, rewards, 0.0).sum(-1)


def _mean(values: Tensor, all_sum: AllSum) -> float:
    total, count = all_sum(torch.stack([values.sum(), values.new_tensor(float(len(values)))])).tolist()
    return total / count
