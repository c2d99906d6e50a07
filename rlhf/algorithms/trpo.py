"""Trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477): PPO's advantages, a step of bounded KL.

The policy takes one step per batch, in `full_batch_step`: along F^-1 g (F the Fisher matrix, g the gradient of the
surrogate mean(r A)), as far as KL(old || policy) = max_kl allows. The minibatches that follow fit only the value
function, so policy and value function must be separate networks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from rlhf.algorithms.base import Group, Loss
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.losses import clipped_value_loss, unclipped_surrogate
from rlhf.core.masking import weighted_sum
from rlhf.core.trust_region import conjugate_gradient, fisher_vector_product, flatten, line_search, step_size
from rlhf.errors import InputError, TrainingError
from rlhf.settings import check_types
from rlhf.types import PolicyOutputs, TrainingBatch


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig:
    """Settings of TRPO's policy step."""

    max_kl: float = 0.01
    """Largest mean KL(old || policy) of one step, in nats."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix. Larger is more stable, and shortens the step where the policy is
    nearly deterministic."""
    cg_iterations: int = 10
    """Maximum number of conjugate-gradient iterations per step; each takes one Fisher-vector product."""
    backtracks: int = 10
    """How often the step may be shortened before it is abandoned."""
    backtrack_decay: float = 0.8
    """Factor by which the step is shortened each time."""
    fisher_subsample: int = 1
    """Use every n-th transition in the Fisher matrix: about n times cheaper. Gradient and line search use all."""

    def __post_init__(self) -> None:
        check_types(self)
        checks = {
            "max_kl": (0 < self.max_kl < float("inf"), "above 0 (usual: 0.01)"),
            "damping": (0 <= self.damping < float("inf"), "0 or more (usual: 0.1)"),
            "cg_iterations": (self.cg_iterations >= 1, "at least 1 (usual: 10)"),
            "backtracks": (self.backtracks >= 0, "0 or more (usual: 10)"),
            "backtrack_decay": (0 < self.backtrack_decay < 1, "between 0 and 1, both excluded (usual: 0.8)"),
            "fisher_subsample": (self.fisher_subsample >= 1, "at least 1, which uses every transition"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise InputError(f"{name} must be {allowed}, got {getattr(self, name)}.")


class TRPO(PPO):
    """TRPO with PPO's settings: gamma, gae_lambda, normalize_advantages, value_coef, value_clip_range and the kl_* of a
    reference policy mean the same; entropy_coef adds the entropy to the surrogate that the policy step improves. The
    trust region replaces surrogate, clip_range and its variants, which are ignored, and the penalty (refused)."""

    def __init__(self, config: PPOConfig | None = None, trust_region: TrustRegionConfig | None = None) -> None:
        super().__init__(config)
        self.trust_region = trust_region or TrustRegionConfig()
        config = self.config
        if config.normalize_advantages == "minibatch":
            raise InputError(
                "normalize_advantages is 'minibatch', but TRPO's policy step has no minibatches: use 'batch' or 'none'."
            )
        if config.baseline == "none":
            raise InputError("baseline is 'none', but TRPO needs a value function: set baseline to 'value'.")
        if config.penalty_coef > 0:
            raise InputError(
                f"penalty_coef = {config.penalty_coef}: TRPO bounds the KL instead of penalising it. Set penalty_coef to 0 "
                "and choose max_kl."
            )
        self.needs = self.needs | {"values", "distribution"}

    def full_batch_step(self, policy: Module, batch: TrainingBatch, group: Group) -> dict[str, float]:
        """Makes the policy step on the global batch, each process computing its share of the rows; returns metrics.

        policy(inputs, actions, with_values=, with_entropy=, old_distribution=) must return `kl`, exact and
        differentiable twice. Raises InputError if policy and value function share parameters, and TrainingError if a
        number is not finite; in both cases the parameters are unchanged.
        """
        settings = self.trust_region
        whole = _Share(policy, batch, group, self.config.entropy_coef)
        if whole.is_empty:
            return {}
        parameters = _policy_parameters(policy, whole.first_row)
        surrogate, kl = whole.terms()
        gradient = group.all_sum(flatten(torch.autograd.grad(surrogate, parameters)))
        objective, old_kl = group.all_sum(torch.stack([surrogate, kl]).detach()).tolist()
        self._check(objective, old_kl, gradient)

        some = _Share(policy, batch, group, self.config.entropy_coef, every=settings.fisher_subsample)
        product = fisher_vector_product(
            lambda: some.terms()[1], parameters, damping=settings.damping, all_sum=group.all_sum
        )
        direction = conjugate_gradient(product, gradient, iterations=settings.cg_iterations)
        curved = product(direction)
        step = step_size(direction, curved, max_kl=settings.max_kl) * direction
        _require_finite("natural gradient", step)

        @torch.no_grad()
        def evaluate() -> tuple[float, float]:
            value, kl = group.all_sum(torch.stack(whole.terms())).tolist()
            return value, kl

        found = line_search(
            parameters,
            step,
            evaluate,
            objective=objective,
            max_kl=settings.max_kl,
            decay=settings.backtrack_decay,
            max_backtracks=settings.backtracks,
        )
        size = gradient.norm()
        return {
            "trust_region_kl": found.kl,
            "line_search_steps": float(found.backtracks),
            "line_search_accepted": float(found.accepted),
            "surrogate_gain": found.gain,
            "cg_residual": ((curved - gradient).norm() / size).item() if size > 0 else 0.0,
        }

    def loss(self, outputs: PolicyOutputs, batch: TrainingBatch) -> Loss:
        """One microbatch's share of the value loss; the policy's own parameters get no gradient from it."""
        assert outputs.values is not None and batch.old_values is not None and batch.returns is not None
        terms = {
            "value": clipped_value_loss(
                outputs.values,
                batch.old_values,
                batch.returns,
                batch.mask,
                value_clip_range=self.config.value_clip_range,
            )
        }
        if outputs.entropy is not None:
            terms["entropy"] = outputs.entropy.detach()
        parts = {n: weighted_sum(term, batch.weightings[n].weight, batch.denominators[n]) for n, term in terms.items()}
        total = self.config.value_coef * parts["value"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # data parallelism waits for a gradient of every parameter that the forward used: give it zeros
            total = total + 0.0 * torch.where(batch.mask, outputs.logprobs, 0.0).sum()
        bounds = {"clip_low": batch.coefficients["clip_low"], "clip_high": batch.coefficients["clip_high"]}
        loss = self._report(total, outputs, batch, parts, bounds)
        return loss._replace(terms={n: term for n, term in loss.terms.items() if not n.startswith("clip_fraction")})

    def _check(self, objective: float, old_kl: float, gradient: Tensor) -> None:
        """Checks before the step: numbers are finite, and the stored distribution is the policy's own."""
        _require_finite("surrogate", torch.tensor(objective))
        _require_finite("KL(old || policy)", torch.tensor(old_kl))
        _require_finite("gradient", gradient)
        if abs(old_kl) > 0.01 * self.trust_region.max_kl + 1e-6:  # less is float32 rounding
            raise TrainingError(
                f"KL(old || policy) is {old_kl:.3g} before TRPO's step, where it must be 0: the policy does not give the "
                "distribution that was stored for the batch. Look for dropout, or for statistics that changed in between."
            )


class _Share:
    """One process's part of the batch. Its terms are shares of the whole batch's means, which add up over processes."""

    def __init__(
        self, policy: Module, batch: TrainingBatch, group: Group, entropy_coef: float, *, every: int = 1
    ) -> None:
        """every: use only each n-th row. Rows of weight 0 are left out, so that their contents are never read."""
        if batch.old_distribution is None:
            raise InputError("TRPO needs the old action distribution: the collector must fill old_distribution.")
        self.policy = policy
        self.entropy_coef = entropy_coef
        batch = batch.select(slice(None, None, every))
        self.denominators = {name: w.count.sum().clamp(min=1e-8) for name, w in batch.weightings.items()}
        rows = (batch.weightings["policy"].weight != 0).any(-1).nonzero().squeeze(-1)
        self.is_empty = len(rows) == 0
        self.first_row = batch.select(rows[:1])
        self.batch = batch.select(rows[group.rank :: group.world_size])

    def terms(self) -> tuple[Tensor, Tensor]:
        """(surrogate + entropy_coef * entropy, mean KL(old || policy)), scalars."""
        batch = self.batch
        weightings = batch.weightings
        outputs: PolicyOutputs = self.policy(
            batch.inputs,
            batch.actions,
            with_values=False,
            with_entropy=self.entropy_coef > 0,
            old_distribution=batch.old_distribution,
        )
        if outputs.kl is None:
            raise InputError(
                f"TRPO needs an exact KL(old || policy), and {type(self.policy).__name__} gives none: its forward must "
                "fill PolicyOutputs.kl when it is given old_distribution."
            )
        weight, denominator = weightings["policy"].weight, self.denominators["policy"]
        losses = unclipped_surrogate(outputs.logprobs, batch.old_logprobs, batch.advantages, batch.mask)
        surrogate = -weighted_sum(losses, weight, denominator)
        if self.entropy_coef > 0:
            assert outputs.entropy is not None
            entropy = weighted_sum(outputs.entropy, weightings["entropy"].weight, self.denominators["entropy"])
            surrogate = surrogate + self.entropy_coef * entropy
        return surrogate, weighted_sum(outputs.kl, weight, denominator)


def _policy_parameters(policy: Module, row: TrainingBatch) -> list[Parameter]:
    """The parameters that the action distribution depends on, found by autograd; the values may not depend on them."""
    outputs: PolicyOutputs = policy(row.inputs, row.actions, with_values=True)
    assert outputs.values is not None
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}

    def reached(output: Tensor) -> set[str]:
        if not output.requires_grad:
            return set()
        gradients = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}

    acting, judging = reached(outputs.logprobs), reached(outputs.values)
    if not acting:
        raise InputError("TRPO found no trainable parameter that the action distribution depends on.")
    if shared := [name for name in named if name in acting & judging]:
        raise InputError(
            f"TRPO needs separate networks, but policy and value function share {shared[0]} ({len(shared)} parameters in "
            "all): fitting the values would move the policy out of its trust region. Set network.shared_trunk to false; "
            "if they must share a module (convolutions, your own features), use PPO."
        )
    return [parameter for name, parameter in named.items() if name in acting]


def _require_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"The {name} of TRPO's policy step is not finite; nothing was applied. Look for an advantage or a model output "
            "of extreme size."
        )
