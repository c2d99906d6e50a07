"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), on control tasks and on language models alike."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.algorithms import State
from rlhf.core.advantages import gae
from rlhf.core.kl import adaptive_kl_coef, kl_estimate
from rlhf.core.losses import clipped_elements, clipped_surrogate, clipped_value_loss, log_ratio, unclipped_surrogate
from rlhf.core.masking import AllSum, masked_mean, weighted_sum, whiten
from rlhf.errors import InputError
from rlhf.types import Metrics, PolicyOutputs, TrainingBatch, Trajectories, token_mean


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """PPO's settings; the defaults are those of language models (Huang et al. 2024, arXiv 2403.17031)."""

    surrogate: Literal["clipped", "unclipped"] = "clipped"
    """The policy objective; "unclipped" is there to be compared with."""
    clip_range: float = 0.2
    """The ratio pi / pi_old gains nothing beyond 1 +- this (eq. 7)."""
    clip_range_high: float | None = None
    """Upper bound 1 + this instead of 1 + clip_range (DAPO's clip-higher uses 0.28)."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage by this many times its size (usual: 3); off if null."""
    anneal_clip: bool = False
    """Let the clip range fall linearly to 0 over the run."""
    value_clip_range: float | None = 0.2
    """Largest change of a value per step, in units of the reward; no limit if null. Where returns are skewed, a small one
    makes the values settle beside their mean."""
    value_coef: float = 0.1
    """Weight of the value loss 0.5 (V - R)^2."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    gamma: float = 1.0
    """Discount per step."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator: 0 = one step, 1 = the whole return."""
    kl_coef: float = 0.05
    """Reward taken off per nat of KL(policy || reference), token by token (estimator k1); 0 needs no reference policy."""
    kl_target: float | None = None
    """Adapt kl_coef so that the KL settles here, in nats per completion (Ziegler et al. 2019, section 2.2)."""
    kl_horizon: int = 10_000
    """Completions over which the adaptive coefficient moves."""
    normalize_advantages: Literal["batch", "minibatch", "none"] = "batch"
    """Whiten advantages over the whole step, over each minibatch, or not at all."""

    def __post_init__(self) -> None:
        for name in ("clip_range", "clip_range_high", "value_clip_range", "kl_target", "kl_horizon"):
            _require(name, getattr(self, name), lambda value: value is None or value > 0, "above 0")
        for name in ("gamma", "gae_lambda"):
            _require(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("value_coef", "entropy_coef", "kl_coef"):
            _require(name, getattr(self, name), lambda value: 0 <= value < float("inf"), "0 or more")
        _require("dual_clip", self.dual_clip, lambda value: value is None or value > 1, "above 1, or null for none")
        if self.kl_target is not None and self.kl_coef == 0:
            raise InputError(
                "kl_target adapts kl_coef, which can never leave 0: set kl_coef above 0, or kl_target to null."
            )


def _require(name: str, value: float | None, holds, wanted: str) -> None:  # type: ignore[no-untyped-def]
    if value is not None and not holds(value):
        raise InputError(f"{name} must be {wanted}, got {value}.")


class PPO:
    """Rewards -> advantages (KL penalty, GAE, whitening) -> loss (policy + value_coef * value - entropy_coef * entropy)."""

    completions_per_prompt = 1

    def __init__(self, config: PPOConfig | None = None) -> None:
        self.config = config = config or PPOConfig()
        needs = {"values": True, "reference": config.kl_coef > 0, "entropy": config.entropy_coef > 0}
        self.needs = frozenset(name for name, needed in needs.items() if needed)
        self.whiten_minibatch = config.normalize_advantages == "minibatch"

    def initial_state(self) -> State:
        return {"kl_coef": self.config.kl_coef}

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards with the KL penalty -> advantages and returns. Adapts state["kl_coef"] for the next step."""
        config, mask = self.config, trajectories.mask
        metrics = {}
        rewards = trajectories.rewards
        if trajectories.ref_logprobs is not None:
            kl = kl_estimate(trajectories.old_logprobs, trajectories.ref_logprobs, "k1")
            kl = torch.where(mask, kl, 0.0)
            rewards = rewards - state["kl_coef"] * kl
            metrics = self._reference_kl(kl, state, all_sum)
        advantages, returns = gae(
            rewards,
            trajectories.values,
            trajectories.next_values,
            trajectories.terminated,
            trajectories.episode_ends,
            mask,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )
        metrics["explained_variance"] = _explained_variance(trajectories.values, returns, mask, all_sum)
        if config.normalize_advantages == "batch":
            advantages = whiten(advantages, mask, all_sum=all_sum)
        weighting = token_mean(mask, advantages.dtype)
        shrink = 1.0 - progress if config.anneal_clip else 1.0
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        return TrainingBatch(
            inputs=trajectories.inputs,
            actions=trajectories.actions,
            mask=mask,
            old_logprobs=trajectories.old_logprobs,
            sampling_logprobs=trajectories.sampling_logprobs,
            advantages=advantages,
            returns=returns,
            old_values=trajectories.values,
            ref_logprobs=trajectories.ref_logprobs,
            row_tokens=trajectories.row_tokens,
            row_index=trajectories.row_index,
            weightings={"policy": weighting, "value": weighting, "entropy": weighting},
            coefficients={"clip_low": config.clip_range * shrink, "clip_high": high * shrink},
            metrics=metrics,
        )

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> tuple[Tensor, Metrics]:
        """One microbatch's share of the loss (eq. 9), over the minibatch's global denominators."""
        config, mask = self.config, batch.mask
        bounds = {"clip_low": batch.coefficients["clip_low"], "clip_high": batch.coefficients["clip_high"]}
        if config.surrogate == "clipped":
            policy_loss = clipped_surrogate(
                outputs.logprobs, batch.old_logprobs, batch.advantages, mask, **bounds, dual_clip=config.dual_clip
            )
        else:
            policy_loss = unclipped_surrogate(outputs.logprobs, batch.old_logprobs, batch.advantages, mask)
        assert outputs.values is not None and batch.old_values is not None and batch.returns is not None
        value_loss = clipped_value_loss(
            outputs.values, batch.old_values, batch.returns, mask, value_clip_range=config.value_clip_range
        )
        terms = {"policy": policy_loss, "value": value_loss}
        coefficients = {"policy": 1.0, "value": config.value_coef, "entropy": -config.entropy_coef}
        if outputs.entropy is not None:
            terms["entropy"] = outputs.entropy
        parts = {
            name: weighted_sum(term, batch.weightings[name].weight, batch.denominators[name])
            for name, term in terms.items()
        }
        total = torch.stack([coefficients[name] * part for name, part in parts.items()]).sum()
        return total, self._metrics(outputs, batch, parts, bounds)

    @torch.no_grad()
    def _metrics(
        self, outputs: PolicyOutputs, batch: TrainingBatch, parts: dict[str, Tensor], bounds: dict[str, float]
    ) -> Metrics:
        """Token means are given as (sum, count); a loss is already a share of the minibatch, counted by its rows' share."""
        mask = batch.weightings["policy"].weight != 0
        count = mask.sum()
        lr = log_ratio(outputs.logprobs, batch.old_logprobs, mask)
        low, high = clipped_elements(lr.exp(), batch.advantages, **bounds)
        elements = {
            "policy_kl": kl_estimate(-lr, torch.zeros_like(lr), "k3"),  # samples of the old policy: KL(old || policy)
            "policy_kl_k1": -lr,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
        }
        stacked = torch.stack([element.to(lr.dtype) for element in elements.values()])
        sums = torch.where(mask, stacked, 0.0).sum((1, 2)).unbind()  # one reduction for all of them
        metrics = {name: (total, count) for name, total in zip(elements, sums, strict=True)}
        for name, part in parts.items():
            share = batch.weightings[name].count.sum() / batch.denominators[name]
            metrics["entropy" if name == "entropy" else f"{name}_loss"] = (part, share)
        return metrics

    def _reference_kl(self, kl: Tensor, state: State, all_sum: AllSum) -> dict[str, float]:
        """Nats per completion of this rollout; adapts the coefficient that the next rollout will use."""
        total, rows = all_sum(torch.stack([kl.sum(), kl.new_tensor(float(kl.shape[0]))])).tolist()
        metrics = {"reward_kl": total / rows, "kl_coef": state["kl_coef"]}
        if self.config.kl_target is not None:
            state["kl_coef"] = adaptive_kl_coef(
                state["kl_coef"],
                metrics["reward_kl"],
                target=self.config.kl_target,
                num_completions=int(rows),
                horizon=self.config.kl_horizon,
            )
        return metrics


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum) -> float:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant; 0 if the returns do not vary."""
    residual = returns - values

    def variance(x: Tensor) -> float:
        mean = masked_mean(x, mask, all_sum)
        return masked_mean((x - mean) ** 2, mask, all_sum).item()

    spread = variance(returns)
    return 1.0 - variance(residual) / spread if spread > 0 else 0.0
