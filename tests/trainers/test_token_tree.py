"""The real `PPOTrainer` against the known optimum.

pi*(y) = ref(y) exp(R(y) / beta) / Z over the 15 sentences of tests/tree.py. With KL in the reward, token by token with
return-to-go, training must end there; with any other placement it must not.
"""

from dataclasses import fields, is_dataclass

import pytest
import torch

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.kl import kl_estimate, sequence_kl_estimate
from rlhf.core.masking import weighted_sum
from rlhf.rollout.engine import GenerationConfig
from rlhf.trainers.config import PPOTrainerConfig
from tests import broken, token_tree, tree
from tests.controls import names

BETA = 0.37
OVERRIDES = {
    "learning_rate": 2e-3,  # the default is for pretrained models of billions of parameters
    "total_steps": 50,
    "generation": GenerationConfig(max_new_tokens=tree.MAX_TOKENS),
    "ppo": PPOConfig(kl_coef=BETA),
}


def learn(output_dir, seed: int = 0, **changes) -> token_tree.Result:
    lm = token_tree.language_model(seed)
    problem = token_tree.problem_of(lm, beta=BETA, seed=seed)
    return token_tree.train(problem, lm, output_dir, **{**OVERRIDES, **changes})


def check_optimum(result: token_tree.Result) -> None:
    print(
        f"regret {result.regret:.4f}, KL(policy || pi*) {result.kl_to_optimum:.4f}, value error {result.value_error:.3f}"
    )
    assert result.regret <= 0.01  # J* - J <= 0.01 (J* - J(reference))
    assert result.kl_to_optimum < 0.01


def check_values(result: token_tree.Result) -> None:
    """V after training against V* (rewards have standard deviation 1), weighted by how often pi* visits a prefix."""
    assert result.value_error < 0.15


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> token_tree.Result:
    return learn(tmp_path_factory.mktemp("tree") / "run")


def test_at_most_four_settings_differ_from_the_defaults():
    def differing(config, default, prefix="") -> list[str]:
        found = []
        for f in fields(config):
            ours, shipped = getattr(config, f.name), getattr(default, f.name)
            if is_dataclass(ours):
                found += differing(ours, shipped, f"{prefix}{f.name}.")
            elif ours != shipped:
                found.append(f"{prefix}{f.name} = {ours} (default {shipped})")
        return found

    overrides = differing(PPOTrainerConfig(output_dir="", **OVERRIDES), PPOTrainerConfig(output_dir=""))
    print("\n".join(overrides))
    assert 1 <= len(overrides) <= 4


def test_the_problem_is_worth_learning():
    """The reference is far from the optimum and far from uniform, so that neither doing nothing nor 'any policy' passes."""
    lm = token_tree.language_model(0)
    problem = token_tree.problem_of(lm, beta=BETA)
    reference, uniform = tree.sequence_logprobs(problem.reference), tree.sequence_logprobs(torch.zeros(7, 3).double())
    assert tree.kl(reference, problem.optimum()) > 1 and tree.kl(uniform, problem.optimum()) > 0.5
    assert problem.best_objective() - problem.objective(problem.reference) > 0.5


def test_ppo_with_shipped_defaults_reaches_the_known_optimum(learnt):
    check_optimum(learnt)


def test_the_value_head_learns_the_soft_values(learnt):
    check_values(learnt)


def test_the_reported_kl_is_the_kl_to_the_reference(learnt):
    """The mean of the last ten steps' k1 over 64 completions each, against the exact KL of the final policy."""
    lm = token_tree.language_model(0)
    reference = token_tree.problem_of(lm, beta=BETA).reference
    exact = tree.kl(tree.sequence_logprobs(learnt.theta), tree.sequence_logprobs(reference))
    reported = sum(step["reward_kl"] for step in learnt.history[-10:]) / 10
    assert reported == pytest.approx(float(exact), rel=0.2)


PLACEMENTS = [broken.kl_k3_takes_the_place_of_k1, broken.kl_swaps_its_arguments]


@pytest.mark.parametrize("variant", PLACEMENTS, ids=names(PLACEMENTS))
def test_a_wrong_kl_in_the_reward_does_not_reach_it(variant, monkeypatch, tmp_path):
    monkeypatch.setattr("rlhf.algorithms.ppo.kl_estimate", variant)
    with pytest.raises(AssertionError):
        check_optimum(learn(tmp_path / "run"))


class KLAsLoss(PPO):
    """No KL in the reward; its estimate from the current policy's log-probs is added to the loss and differentiated."""

    estimator = "k1"

    def prepare(self, trajectories, progress, state, all_sum):
        return super().prepare(trajectories, progress, {"kl_coef": 0.0}, all_sum)

    def loss(self, outputs, batch):
        loss = super().loss(outputs, batch)
        weighting, denominator = batch.weightings["policy"], batch.denominators["policy"]
        penalty = weighted_sum(self.penalty(outputs, batch), weighting.weight, denominator)
        return loss._replace(total=loss.total + self.config.kl_coef * penalty)

    def penalty(self, outputs, batch):
        return kl_estimate(outputs.logprobs, batch.ref_logprobs, self.estimator)


class TokenK3AsLoss(KLAsLoss):
    estimator = "k3"


class SequenceK2AsLoss(KLAsLoss):
    """Of the summed log-ratio, given to the first token of each row: with k1 in the reward the only right placement."""

    def penalty(self, outputs, batch):
        first = torch.zeros_like(batch.mask)
        first[:, 0] = True
        k2 = sequence_kl_estimate(outputs.logprobs, batch.ref_logprobs, batch.mask, "k2")
        return torch.where(first, k2.unsqueeze(1), 0.0)


def test_k1_as_a_loss_does_not_reach_it(monkeypatch, tmp_path):
    """Its expected gradient is 0: the policy follows the reward alone."""
    monkeypatch.setattr("rlhf.trainers.ppo.PPO", KLAsLoss)
    with pytest.raises(AssertionError):
        check_optimum(learn(tmp_path / "run"))


@pytest.mark.slow
def test_token_k3_as_a_loss_does_not_reach_it_even_unwhitened(monkeypatch, tmp_path):
    monkeypatch.setattr("rlhf.trainers.ppo.PPO", TokenK3AsLoss)
    with pytest.raises(AssertionError):
        check_optimum(
            learn(tmp_path / "run", ppo=PPOConfig(kl_coef=BETA, normalize_advantages="none"), total_steps=200)
        )


@pytest.mark.slow
def test_k2_of_the_summed_log_ratio_as_a_loss_reaches_it(monkeypatch, tmp_path):
    """The other right placement (D24). Unwhitened: whitening would change the weight of the reward against the loss."""
    monkeypatch.setattr("rlhf.trainers.ppo.PPO", SequenceK2AsLoss)
    settings = PPOConfig(kl_coef=BETA, normalize_advantages="none", gae_lambda=1.0)
    check_optimum(learn(tmp_path / "run", ppo=settings, total_steps=200))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_trees_are_learnt_too(seed, tmp_path):
    """Other random models, references and rewards, whose optima are nearer to the reference; twice the steps."""
    result = learn(tmp_path / "run", seed, learning_rate=3e-3, total_steps=100)
    check_optimum(result)
    check_values(result)
