"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), for control tasks and language models."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.algorithms.base import Algorithm, Loss, State
from rlhf.core.advantages import gae
from rlhf.core.kl import adaptive_kl_coef, adaptive_penalty_coef, kl_estimate
from rlhf.core.losses import (
    clipped_elements,
    clipped_surrogate,
    clipped_value_loss,
    log_ratio,
    score_surrogate,
    unclipped_surrogate,
)
from rlhf.core.masking import AllSum, masked_mean, weighted_sum, whiten
from rlhf.errors import InputError
from rlhf.settings import check_types
from rlhf.types import PolicyOutputs, TrainingBatch, Trajectories, token_mean


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """PPO's settings; the defaults are those of language models (Huang et al. 2024, arXiv 2403.17031)."""

    surrogate: Literal["clipped", "unclipped", "score"] = "clipped"
    """Policy objective. "clipped": min(r A, clip(r) A). "unclipped": r A (with a penalty, or to see what the clip
    prevents). "score": log pi A (REINFORCE and A2C; one epoch)."""
    clip_range: float = 0.2
    """The ratio pi / pi_old is clipped to 1 +- this (eq. 7)."""
    clip_range_high: float | None = None
    """Upper bound 1 + this instead of 1 + clip_range (DAPO's clip-higher uses 0.28)."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage by this many times its size (usual: 3); off if null."""
    anneal_clip: bool = False
    """Let the clip range fall linearly to 0 over the run."""
    penalty_coef: float = 0.0
    """PPO-Penalty: weight of KL(old || policy) in the loss, per nat; usually with surrogate "unclipped" (eq. 8)."""
    penalty_target: float | None = None
    """Target of KL(old || policy) in nats. penalty_coef is halved below target / 1.5 and doubled above 1.5 target; null
    keeps it fixed."""
    penalty_adapts: Literal["rollout", "epoch"] = "rollout"
    """When the KL is measured and penalty_coef adapted: after the last epoch of a rollout (section 4 of the paper), or
    after each epoch."""
    baseline: Literal["value", "none"] = "value"
    """Baseline of the returns: a learnt value function, or none (REINFORCE; needs whole episodes)."""
    value_clip_range: float | None = 0.2
    """Largest change of a value per step, in units of the reward; no limit if null. With skewed returns, a small range
    makes the values settle away from the mean return."""
    value_coef: float = 0.1
    """Weight of the value loss 0.5 (V - R)^2."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    gamma: float = 1.0
    """Discount per step."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator: 0 = one step, 1 = the whole return."""
    kl_coef: float = 0.05
    """Reward subtracted per nat of KL(policy || reference), per token (estimator k1); 0 needs no reference policy."""
    kl_target: float | None = None
    """Adapt kl_coef to bring the KL to this, in nats per completion (Ziegler et al. 2019, section 2.2); fixed if null."""
    kl_horizon: int = 10_000
    """Number of completions over which kl_coef adapts to kl_target; larger is slower."""
    normalize_advantages: Literal["batch", "minibatch", "none"] = "batch"
    """Whiten advantages over the whole step, over each minibatch, or not at all."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("clip_range", "clip_range_high", "value_clip_range", "kl_target", "kl_horizon", "penalty_target"):
            _require(name, getattr(self, name), lambda value: value is None or value > 0, "above 0")
        for name in ("gamma", "gae_lambda"):
            _require(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("value_coef", "entropy_coef", "kl_coef", "penalty_coef"):
            _require(name, getattr(self, name), lambda value: 0 <= value < float("inf"), "0 or more")
        _require("dual_clip", self.dual_clip, lambda value: value is None or value > 1, "above 1, or null for off")
        if self.kl_target is not None and self.kl_coef == 0:
            raise InputError(
                "kl_target scales kl_coef, and a kl_coef of 0 stays 0: set kl_coef above 0, or kl_target to null."
            )
        if self.penalty_target is not None and self.penalty_coef == 0:
            raise InputError(
                "penalty_target scales penalty_coef, and a penalty_coef of 0 stays 0: set penalty_coef above 0 "
                "(usual: 1), or penalty_target to null."
            )
        if self.baseline == "none" and self.gae_lambda != 1:
            raise InputError(
                f"gae_lambda = {self.gae_lambda} needs values, but baseline is 'none': set gae_lambda to 1, or "
                "baseline to 'value'."
            )


def _require(name: str, value: float | None, holds, wanted: str) -> None:  # type: ignore[no-untyped-def]
    if value is not None and not holds(value):
        raise InputError(f"{name} must be {wanted}, got {value}.")


class PPO(Algorithm):
    """Rewards -> advantages (KL penalty, GAE, whitening) -> loss (policy + value_coef * value - entropy_coef * entropy)."""

    def __init__(self, config: PPOConfig | None = None) -> None:
        self.config = config = config or PPOConfig()
        needs = {
            "values": config.baseline == "value",
            "reference": config.kl_coef > 0,
            "entropy": config.entropy_coef > 0,
            "distribution": config.penalty_coef > 0,
        }
        self.needs = frozenset(name for name, needed in needs.items() if needed)
        self.whiten_minibatch = config.normalize_advantages == "minibatch"
        if config.penalty_coef > 0:  # also with a fixed coefficient, to log the KL
            self.measures_kl = "epoch" if config.penalty_target and config.penalty_adapts == "epoch" else "update"

    def initial_state(self) -> State:
        """The coefficients that have a target. The others stay as set, also when a run is resumed."""
        config = self.config
        state: State = {}
        if config.kl_target is not None:
            state["kl_coef"] = config.kl_coef
        if config.penalty_target is not None:
            state["penalty_coef"] = config.penalty_coef
        return state

    def adapt(self, state: State, kl: float) -> dict[str, float]:
        """Adapts PPO-Penalty's coefficient for the following epochs."""
        if self.config.penalty_target is None:
            return {}
        state["penalty_coef"] = adaptive_penalty_coef(state["penalty_coef"], kl, target=self.config.penalty_target)
        return {"penalty_coef": state["penalty_coef"]}

    def advantages(self, rewards: Tensor, trajectories: Trajectories, all_sum: AllSum) -> tuple[Tensor, Tensor]:
        """Generalised advantage estimation, and its returns."""
        return gae(
            rewards,
            trajectories.values,
            trajectories.next_values,
            trajectories.terminated,
            trajectories.episode_ends,
            trajectories.mask,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )

    def prepare(self, trajectories: Trajectories, progress: float, state: State, all_sum: AllSum) -> TrainingBatch:
        """Rewards with the KL penalty -> advantages and returns. Adapts state["kl_coef"] for the next step."""
        config = self.config
        mask = trajectories.mask
        metrics = {}
        rewards = trajectories.rewards
        if trajectories.ref_logprobs is not None:
            kl = kl_estimate(trajectories.old_logprobs, trajectories.ref_logprobs, "k1")
            kl = torch.where(mask, kl, 0.0)
            rewards = rewards - state.get("kl_coef", config.kl_coef) * kl
            metrics = self._reference_kl(kl, state, all_sum)
        advantages, returns = self.advantages(rewards, trajectories, all_sum)
        if "values" in self.needs:
            metrics["explained_variance"] = _explained_variance(trajectories.values, returns, mask, all_sum)
        if config.penalty_coef > 0:
            metrics["penalty_coef"] = state.get("penalty_coef", config.penalty_coef)
        if config.normalize_advantages == "batch":
            advantages = whiten(advantages, mask, all_sum=all_sum)
        weighting = token_mean(mask, advantages.dtype)
        low, high = self.clip_bounds(progress)
        return trajectories.batch(
            advantages=advantages,
            returns=returns,
            old_values=trajectories.values,
            old_distribution=trajectories.old_distribution if "distribution" in self.needs else None,
            weightings={"policy": weighting, "value": weighting, "entropy": weighting},
            coefficients={
                "clip_low": low,
                "clip_high": high,
                "penalty_coef": state.get("penalty_coef", config.penalty_coef),
            },
            metrics=metrics,
        )

    def clip_bounds(self, progress: float) -> tuple[float, float]:
        """The ratio's clip range, (below 1, above 1), after the share `progress` of the run."""
        config = self.config
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        shrink = 1.0 - progress if config.anneal_clip else 1.0
        return config.clip_range * shrink, high * shrink

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Loss:
        """One microbatch's share of the loss (eq. 9), over the minibatch's global denominators."""
        config = self.config
        mask = batch.mask
        bounds = {"clip_low": batch.coefficients["clip_low"], "clip_high": batch.coefficients["clip_high"]}
        terms = {"policy": self._policy_loss(outputs, batch, bounds)}
        coefficients = {"value": config.value_coef, "entropy": -config.entropy_coef}
        if config.baseline == "value":
            assert outputs.values is not None and batch.old_values is not None and batch.returns is not None
            terms["value"] = clipped_value_loss(
                outputs.values, batch.old_values, batch.returns, mask, value_clip_range=config.value_clip_range
            )
        if config.penalty_coef > 0:
            terms["penalty"] = self._penalty(outputs, batch)
            coefficients["penalty"] = batch.coefficients["penalty_coef"]
        if outputs.entropy is not None:
            terms["entropy"] = outputs.entropy
        parts = {}
        for name, term in terms.items():
            like = "policy" if name == "penalty" else name
            parts[name] = weighted_sum(term, batch.weightings[like].weight, batch.denominators[like])
        total = parts["policy"]
        for name in list(parts)[1:]:
            total = total + coefficients[name] * parts[name]
        return self._report(total, outputs, batch, parts, bounds)

    def _policy_loss(self, outputs: PolicyOutputs, batch: TrainingBatch, bounds: dict[str, float]) -> Tensor:
        config = self.config
        mask = batch.mask
        if config.surrogate == "score":
            return score_surrogate(outputs.logprobs, batch.advantages, mask)
        old = batch.old_logprobs
        if config.surrogate == "unclipped":
            return unclipped_surrogate(outputs.logprobs, old, batch.advantages, mask)
        return clipped_surrogate(outputs.logprobs, old, batch.advantages, mask, **bounds, dual_clip=config.dual_clip)

    def _penalty(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Tensor:
        """KL(old || policy) per element: exact where the policy gives it, else k3, whose gradient is unbiased here."""
        if outputs.kl is not None:
            return outputs.kl
        log_ratios = log_ratio(outputs.logprobs, batch.old_logprobs, batch.mask)
        return kl_estimate(-log_ratios, torch.zeros_like(log_ratios), "k3")

    @torch.no_grad()
    def _report(
        self,
        total: Tensor,
        outputs: PolicyOutputs,
        batch: TrainingBatch,
        parts: dict[str, Tensor],
        bounds: dict[str, float],
    ) -> Loss:
        """The loss and its metrics: token means, and each term with this microbatch's share of its denominator."""
        mask = batch.weightings["policy"].weight != 0
        count = mask.sum()
        # 0 outside the mask, so that nothing is added there. Samples are the old policy's: k3 estimates KL(old || policy).
        log_ratios = log_ratio(outputs.logprobs, batch.old_logprobs, mask)
        low, high = clipped_elements(log_ratios.exp(), batch.advantages, **bounds)
        k3 = kl_estimate(-log_ratios, torch.zeros_like(log_ratios), "k3")
        names = ("policy_kl", "policy_kl_k1", "clip_fraction_low", "clip_fraction_high")
        sums = (
            torch.stack([k3, -log_ratios, low.to(k3.dtype), high.to(k3.dtype)]).sum((1, 2)).unbind()
        )  # one reduction for all
        terms = {name: (value, count) for name, value in zip(names, sums, strict=True)}
        shares: dict[int, Tensor] = {}
        for name, part in parts.items():
            if name == "penalty":
                continue  # the coefficient times a KL that is already logged
            counts = batch.weightings[name].count
            if id(counts) not in shares:
                shares[id(counts)] = counts.sum() / batch.denominators[name]
            terms["entropy" if name == "entropy" else f"{name}_loss"] = (part, shares[id(counts)])
        return Loss(total, terms, terms.pop("policy_kl"))

    def _reference_kl(self, kl: Tensor, state: State, all_sum: AllSum) -> dict[str, float]:
        """Metrics of the KL to the reference, in nats per completion; adapts the coefficient for the next rollout."""
        total, rows = all_sum(torch.stack([kl.sum(), kl.new_tensor(float(kl.shape[0]))])).tolist()
        metrics = {"reward_kl": total / rows, "kl_coef": state.get("kl_coef", self.config.kl_coef)}
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
