"""The same minibatch through Stable-Baselines3's PPO: where the formulas agree, so do the gradients.

SB3's own `PPO.train` runs (one epoch, one minibatch); its gradients are what it leaves in the parameters. Ours come from
`PPO.loss` on the logits and values of the very same network. Three differences are known and taken out:

- SB3's value loss is mean((V - R)^2), ours 0.5 * mean((V - R)^2): its vf_coef 0.5 is our value_coef 1.0, not 0.5.
- SB3's `clip_range_vf` has no max (test_losses.py shows three of four cases differ), so it is off here.
- SB3 whitens with the unbiased standard deviation, ours divides by the count; so whitening is off here.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.advantages import gae
from rlhf.core.logprobs import entropy, token_logprobs
from rlhf.types import PolicyOutputs, TrainingBatch, token_mean
from tests import broken
from tests.controls import refute
from tests.rounding import EPS

sb3 = pytest.importorskip("stable_baselines3")
gymnasium = pytest.importorskip("gymnasium")

ROWS, VF_COEF, CLIP = 256, 0.5, 0.2


class Minibatch:
    """Transitions of CartPole in SB3's rollout buffer, and its policy moved away from the one that collected them."""

    def __init__(self, ent_coef: float, vf_coef: float) -> None:
        self.model = sb3.PPO(
            "MlpPolicy",
            gymnasium.make("CartPole-v1"),
            n_steps=ROWS,
            batch_size=ROWS,
            n_epochs=1,
            clip_range=CLIP,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            normalize_advantage=False,
            max_grad_norm=1e9,
            learning_rate=0.0,
            seed=0,
            device="cpu",
            policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
        )
        _, callback = self.model._setup_learn(ROWS)
        self.model.collect_rollouts(self.model.env, callback, self.model.rollout_buffer, ROWS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.policy.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        buffer = self.model.rollout_buffer
        self.observations = torch.as_tensor(buffer.observations).squeeze(1)
        self.actions, self.old_logprobs, self.returns, self.old_values = (
            torch.as_tensor(x).reshape(ROWS, 1)
            for x in (buffer.actions, buffer.log_probs, buffer.returns, buffer.values)
        )

    def set_advantages(self, advantages: torch.Tensor) -> None:
        self.model.rollout_buffer.advantages[:] = advantages.numpy()

    def their_gradient(self) -> torch.Tensor:
        self.model.train()
        return self._flat(p.grad for p in self.model.policy.parameters())

    def our_gradient(self, advantages: torch.Tensor, config: PPOConfig) -> torch.Tensor:
        policy = self.model.policy
        logits = policy.get_distribution(self.observations).distribution.logits.unsqueeze(1)
        outputs = PolicyOutputs(
            logprobs=token_logprobs(logits, self.actions.long()),
            values=policy.predict_values(self.observations),
            entropy=entropy(logits),
        )
        mask = torch.ones(ROWS, 1, dtype=torch.bool)
        weighting = token_mean(mask, torch.float32)
        batch = TrainingBatch(
            inputs={},
            actions=self.actions,
            mask=mask,
            old_logprobs=self.old_logprobs,
            sampling_logprobs=self.old_logprobs,
            advantages=advantages,
            returns=self.returns,
            old_values=self.old_values,
            row_tokens=torch.ones(ROWS, dtype=torch.int64),
            row_index=torch.arange(ROWS),
            weightings=dict.fromkeys(("policy", "value", "entropy"), weighting),
            coefficients={"clip_low": CLIP, "clip_high": CLIP},
            denominators=dict.fromkeys(("policy", "value", "entropy"), torch.tensor(float(ROWS))),
        )
        policy.zero_grad()
        loss = PPO(config).loss(outputs, batch)
        loss.total.backward()
        self.clipped = sum(float(loss.terms[f"clip_fraction_{side}"][0]) for side in ("low", "high"))
        return self._flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters())

    @staticmethod
    def _flat(gradients) -> torch.Tensor:
        return torch.cat([g.detach().flatten().clone() for g in gradients])


TERMS = {
    # name: (advantages count, SB3's ent_coef, SB3's vf_coef, our settings)
    "policy": (1.0, 0.0, 0.0, {"value_coef": 0.0}),
    "value": (0.0, 0.0, VF_COEF, {"value_coef": 2 * VF_COEF}),
    "entropy": (0.0, 0.01, 0.0, {"value_coef": 0.0, "entropy_coef": 0.01}),
    "all": (1.0, 0.01, VF_COEF, {"value_coef": 2 * VF_COEF, "entropy_coef": 0.01}),
}


@pytest.fixture(scope="module")
def minibatches():
    return {name: Minibatch(ent_coef, vf_coef) for name, (_, ent_coef, vf_coef, _) in TERMS.items()}


def check_gradient(minibatches, term: str, **changes: float) -> None:
    scale, _, _, settings = TERMS[term]
    minibatch = minibatches[term]
    advantages = scale * torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(1))
    minibatch.set_advantages(advantages)
    config = replace(PPOConfig(kl_coef=0.0, value_clip_range=None, clip_range=CLIP, **settings), **changes)
    theirs, ours = minibatch.their_gradient(), minibatch.our_gradient(advantages, config)
    assert theirs.abs().max() > 1e-4  # there is a gradient to compare
    torch.testing.assert_close(ours, theirs, rtol=1024 * EPS, atol=16 * EPS * float(theirs.abs().max()) + 1e-8)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_equal_those_of_stable_baselines3(minibatches, term):
    check_gradient(minibatches, term)


def test_a_good_part_of_the_minibatch_is_clipped(minibatches):
    """Otherwise the comparison of policy gradients would say nothing about the clip."""
    check_gradient(minibatches, "policy")
    assert 0.05 * ROWS < minibatches["policy"].clipped < 0.95 * ROWS


def test_the_half_in_the_value_loss_is_the_only_difference_of_the_coefficients(minibatches):
    with pytest.raises(AssertionError):
        check_gradient(minibatches, "value", value_coef=VF_COEF)


@pytest.mark.parametrize(
    ("term", "function", "variant"),
    [
        ("policy", "clipped_surrogate", broken.clip_takes_the_larger_side),
        ("policy", "clipped_surrogate", broken.clip_is_missing),
        ("policy", "clipped_surrogate", broken.clip_flips_the_advantage),
        ("policy", "clipped_surrogate", broken.clip_inverts_the_ratio),
        ("value", "clipped_value_loss", broken.value_loss_has_the_wrong_sign),
        ("value", "clipped_value_loss", broken.value_loss_counts_the_half_twice),
        ("all", "weighted_sum", lambda values, weight, denominator: values.sum()),
    ],
)
def test_the_comparison_notices(minibatches, monkeypatch, term, function, variant):
    monkeypatch.setattr(f"rlhf.algorithms.ppo.{function}", variant)
    with pytest.raises(AssertionError):
        check_gradient(minibatches, term)


def check_advantages(gae) -> None:
    """SB3 folds gamma V(final observation) into the reward and then treats a time limit as a termination: equal numbers."""
    from stable_baselines3.common.buffers import RolloutBuffer

    gamma, gae_lambda, steps, envs = 0.97, 0.9, 40, 3
    rng = np.random.default_rng(0)
    rewards, values, final_values = rng.normal(size=(3, steps, envs))
    terminated, truncated = rng.random(size=(2, steps, envs)) < 0.1
    truncated &= ~terminated
    ends = terminated | truncated
    last_values = rng.normal(size=envs)

    space = gymnasium.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, space, gymnasium.spaces.Discrete(2), gamma=gamma, gae_lambda=gae_lambda, n_envs=envs)
    starts = np.ones(envs)
    for t in range(steps):
        folded = rewards[t] + gamma * np.where(truncated[t], final_values[t], 0)
        buffer.add(
            np.zeros((envs, 1)), np.zeros((envs, 1)), folded, starts, torch.as_tensor(values[t]), torch.zeros(envs)
        )
        starts = ends[t]
    buffer.compute_returns_and_advantage(torch.as_tensor(last_values), ends[-1])

    following = np.concatenate([values[1:], last_values[None]])
    next_values = np.where(truncated, final_values, following)
    rows = [torch.as_tensor(x.T.copy()) for x in (rewards, values, next_values, terminated, ends)]
    advantages, returns = gae(*rows, torch.ones(envs, steps, dtype=torch.bool), gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantages.numpy().T, buffer.advantages, rtol=0, atol=256 * EPS)
    np.testing.assert_allclose(returns.numpy().T, buffer.returns, rtol=0, atol=256 * EPS)


def test_advantages_equal_those_of_stable_baselines3():
    check_advantages(gae)
    for variant in (
        broken.gae_takes_truncation_for_termination,
        broken.gae_cuts_only_at_terminations,
        broken.gae_forgets_lambda,
    ):
        refute(check_advantages, variant)
