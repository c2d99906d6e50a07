"""PPO: rewards to advantages by hand, the exact gradient, the loss and its metrics, and its settings."""

from dataclasses import replace
from math import inf, log, nan, sqrt

import pytest
import torch

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.errors import InputError
from rlhf.types import PolicyOutputs, Weighting
from tests import broken, tree
from tests.algorithms.completions import EXACT, T, f64, prepare, trajectories, with_broken
from tests.controls import names, refute

# --- prepare ---


def check_kl_in_the_reward() -> None:
    """kl_coef 0.5: rewards -0.1, -0.2, 1 + 0.1 and -0.3, 2. lambda = 1: the returns are their sums to the end."""
    batch = prepare(PPOConfig(kl_coef=0.5, gae_lambda=1.0, normalize_advantages="none"))
    torch.testing.assert_close(batch.returns, f64([[0.8, 0.9, 1.1], [1.7, 2.0, 0]]), **EXACT)
    torch.testing.assert_close(batch.advantages, f64([[0.3, 0.65, 0.35], [0.7, 1.5, 0]]), **EXACT)


def test_the_kl_penalty_is_a_reward_and_both_advantages_and_value_targets_carry_what_follows():
    check_kl_in_the_reward()


REWARD_KL = [
    broken.kl_has_the_wrong_sign,
    broken.kl_swaps_its_arguments,
    broken.kl_k3_takes_the_place_of_k1,
    broken.kl_k2_takes_the_place_of_k1,
    broken.kl_is_zero,
]


@pytest.mark.parametrize("variant", REWARD_KL, ids=names(REWARD_KL))
def test_the_check_of_the_penalty_notices(variant):
    refute(with_broken("kl_estimate", check_kl_in_the_reward), variant)


def test_one_step_returns_read_the_next_value_and_none_after_the_end():
    """lambda = 0: reward plus the value of the next state; the score alone on the last token."""
    batch = prepare(PPOConfig(kl_coef=0.5, gae_lambda=0.0, normalize_advantages="none"))
    torch.testing.assert_close(batch.returns, f64([[0.15, 0.55, 1.1], [0.2, 2.0, 0]]), **EXACT)


def test_without_a_reference_the_reward_is_the_score_alone():
    config = PPOConfig(kl_coef=0.0, gae_lambda=1.0, normalize_advantages="none")
    batch = prepare(config, trajectories(ref_logprobs=None))
    torch.testing.assert_close(batch.returns, f64([[1, 1, 1], [2, 2, 0]]), **EXACT)
    assert "reference" not in PPO(config).needs and "reward_kl" not in batch.metrics


def check_whitened() -> None:
    """Advantages have mean 0 and variance 1 over the five tokens, 0 on padding; the value targets stay as they were."""
    plain = prepare(PPOConfig(kl_coef=0.5, gae_lambda=1.0, normalize_advantages="none"))
    batch = prepare(PPOConfig(kl_coef=0.5, gae_lambda=1.0, normalize_advantages="batch"))
    torch.testing.assert_close(batch.returns, plain.returns, **EXACT)
    raw = f64([0.3, 0.65, 0.35, 0.7, 1.5])  # mean 0.7, variance (0.16 + 0.0025 + 0.1225 + 0 + 0.64) / 5 = 0.185
    torch.testing.assert_close(batch.advantages[batch.mask], (raw - 0.7) / sqrt(0.185), rtol=0, atol=1e-6)
    assert batch.advantages[1, 2] == 0


def test_whitening_changes_advantages_and_leaves_value_targets_alone():
    check_whitened()
    for variant in (broken.whiten_adds_the_mean_back, broken.whiten_ignores_the_mask):
        refute(with_broken("whiten", check_whitened), variant)


def check_adaptation() -> None:
    """KL per completion: (0.4 + 0.6) / 2 = 0.5, twice the target of 0.25; 2 completions, horizon 10."""
    config = PPOConfig(kl_coef=0.5, kl_target=0.25, kl_horizon=10, gae_lambda=1.0, normalize_advantages="none")
    state = PPO(config).initial_state()
    batch = prepare(config, state=state)
    assert batch.metrics["reward_kl"] == pytest.approx(0.5, abs=1e-12)
    assert batch.metrics["kl_coef"] == 0.5 and batch.returns[1, 0].item() == pytest.approx(1.7, abs=1e-12)
    assert state["kl_coef"] == pytest.approx(0.5 * (1 + 0.2 * 2 / 10), abs=1e-12)
    second = prepare(config, state=state)
    assert second.metrics["kl_coef"] == pytest.approx(0.52, abs=1e-12)
    assert second.returns[1, 0].item() == pytest.approx(2 - 0.6 * 0.52, abs=1e-12)


def test_the_coefficient_adapts_to_the_kl_of_completions_and_acts_from_the_next_step():
    check_adaptation()
    refute(with_broken("adaptive_kl_coef", check_adaptation), broken.kl_coef_adapts_the_wrong_way)
    refute(with_broken("adaptive_kl_coef", check_adaptation), broken.kl_coef_never_adapts)


def test_explained_variance_by_hand():
    """Returns 1, 2, 3, 4 and values that are right up to a constant explain all; constant values explain nothing."""
    mask, last = torch.tensor([[T, T, T, T]]), torch.tensor([[T, T, T, T]])
    base = {
        "mask": mask,
        "rewards": f64([[1, 2, 3, 4]]),
        "terminated": last,
        "episode_ends": last,
        "next_values": f64([[0] * 4]),
    }
    base |= {"sampling_logprobs": f64([[0] * 4]), "old_logprobs": f64([[0] * 4]), "ref_logprobs": None}
    for values, explained in [([11, 12, 13, 14], 1.0), ([7, 7, 7, 7], 0.0), ([4, 3, 2, 1], -3.0), ([1, 2, 3, 2], 0.4)]:
        # residuals of the last: 0, 0, 0, 2, variance 1 - 0.25 = 0.75; the returns' is 1.25
        batch = prepare(PPOConfig(kl_coef=0.0), trajectories(**base, values=f64([values])))
        assert batch.metrics["explained_variance"] == pytest.approx(explained, abs=1e-12)


def test_the_clip_range_falls_with_progress_only_if_asked():
    for anneal, expected in [(True, (0.05, 0.1)), (False, (0.2, 0.4))]:
        batch = prepare(PPOConfig(clip_range_high=0.4, anneal_clip=anneal), progress=0.75)
        assert (batch.coefficients["clip_low"], batch.coefficients["clip_high"]) == pytest.approx(expected)


# --- the exact gradient of J (D2, D3, D5, B3) ---


def enumerated(problem: tree.Problem, theta: torch.Tensor, values: torch.Tensor, config: PPOConfig):
    """All 15 sentences as one batch, each weighing its probability, with PPO's own KL penalty and GAE."""
    logprobs = tree.token_logprobs(theta)
    stands = torch.where(tree.MASK, values[tree.STATES], 0.0)
    after = torch.cat([stands[:, 1:], torch.zeros(15, 1).double()], 1)
    batch = prepare(
        config,
        trajectories(
            inputs={"states": tree.STATES},
            actions=tree.TOKENS,
            mask=tree.MASK,
            rewards=torch.where(tree.ENDS, problem.rewards.unsqueeze(1), 0.0),
            sampling_logprobs=logprobs.detach(),
            old_logprobs=logprobs.detach(),
            ref_logprobs=tree.token_logprobs(problem.reference),
            values=stands,
            next_values=torch.where(tree.ENDS, 0.0, after),
            terminated=tree.ENDS,
            episode_ends=tree.ENDS,
            row_tokens=tree.LENGTHS,
            row_index=torch.arange(15),
        ),
    )
    probabilities = tree.sequence_logprobs(theta).exp().detach()
    weighting = Weighting(torch.where(tree.MASK, probabilities.unsqueeze(1), 0.0), probabilities)
    return replace(
        batch, weightings={"policy": weighting, "value": weighting}, denominators={"policy": 1.0, "value": 1.0}
    ), logprobs


def check_exact_gradient() -> None:
    """The expected policy gradient of a step is that of E[R] - beta KL(policy || reference), whatever the critic."""
    problem, theta = tree.random_problem(4)
    theta.requires_grad_()
    for critic in (torch.zeros(7).double(), torch.linspace(-1, 1, 7).double()):
        config = PPOConfig(kl_coef=problem.beta, gae_lambda=1.0, normalize_advantages="none", value_coef=0.0)
        batch, logprobs = enumerated(problem, theta, critic, config)
        loss = PPO(config).loss(PolicyOutputs(logprobs=logprobs, values=batch.old_values), batch).total
        (ours,) = torch.autograd.grad(loss, theta)
        (wanted,) = torch.autograd.grad(problem.objective(theta), theta)
        torch.testing.assert_close(ours, -wanted, **EXACT)


def test_over_the_whole_language_ppos_gradient_is_the_exact_one():
    check_exact_gradient()


@pytest.mark.parametrize("variant", REWARD_KL, ids=names(REWARD_KL))
def test_the_exact_gradient_notices(variant):
    refute(with_broken("kl_estimate", check_exact_gradient), variant)


def check_fixed_point() -> None:
    """At pi* with the soft values V*, every advantage of every sentence is 0, for every lambda (D2)."""
    problem, _ = tree.random_problem(5)
    values, _ = problem.soft_values()
    for gae_lambda in (0.0, 0.7, 0.95, 1.0):
        config = PPOConfig(kl_coef=problem.beta, gae_lambda=gae_lambda, normalize_advantages="none")
        batch, _ = enumerated(problem, problem.best_logits(), values, config)
        torch.testing.assert_close(batch.advantages, torch.zeros(15, 3).double(), rtol=0, atol=1e-10)


def test_nothing_is_left_to_learn_at_the_optimum():
    check_fixed_point()
    for variant in REWARD_KL:
        refute(with_broken("kl_estimate", check_fixed_point), variant)
    refute(with_broken("gae", check_fixed_point), broken.gae_bootstraps_from_the_same_state)


def test_the_trees_own_closed_forms_agree_with_each_other():
    """D1, D2: J(pi) = J* - beta KL(pi || pi*) for any pi; backward induction gives the same optimum and value."""
    problem, theta = tree.random_problem(6)
    gap = problem.beta * tree.kl(tree.sequence_logprobs(theta), problem.optimum())
    torch.testing.assert_close(problem.objective(theta), problem.best_objective() - gap, **EXACT)
    best = problem.best_logits().requires_grad_()
    torch.testing.assert_close(tree.sequence_logprobs(best), problem.optimum(), **EXACT)
    torch.testing.assert_close(problem.soft_values()[0][0], problem.best_objective(), **EXACT)
    (slope,) = torch.autograd.grad(problem.objective(best), best)
    torch.testing.assert_close(slope, torch.zeros(7, 3).double(), **EXACT)


# --- loss and metrics ---


def loss_case():
    """Four samples of the old policy (1/2, 1/4, 1/4), each action as often as it is likely: token means are exact means."""
    old, new = f64([0.5, 0.25, 0.25]), f64([0.25, 0.375, 0.375])
    actions = torch.tensor([[0, 0, 1, 2]])
    ones = torch.ones(1, 4).double()
    config = PPOConfig(value_coef=0.5, entropy_coef=0.25, value_clip_range=0.2, kl_coef=0.0)
    batch = prepare(
        config,
        trajectories(
            inputs={},
            actions=actions,
            mask=torch.ones(1, 4, dtype=torch.bool),
            rewards=ones,
            sampling_logprobs=old.log()[actions],
            old_logprobs=old.log()[actions],
            ref_logprobs=None,
            values=0 * ones,
            next_values=0 * ones,
            terminated=torch.ones(1, 4, dtype=torch.bool),
            episode_ends=torch.ones(1, 4, dtype=torch.bool),
            row_tokens=torch.tensor([4]),
            row_index=torch.tensor([0]),
        ),
    )
    batch = replace(
        batch, advantages=f64([[-1, 2, 1, -1]]), denominators={n: f64(4) for n in ("policy", "value", "entropy")}
    )
    outputs = PolicyOutputs(
        logprobs=new.log()[actions], values=f64([[-0.5, 0.1, 0.5, 2.5]]), entropy=f64([[1, 2, 3, 4]])
    )
    return PPO(config), outputs, batch


def check_loss() -> None:
    """Ratios 1/2, 1/2, 3/2, 3/2 with A = -1, 2, 1, -1: -min(rA, clip(r)A) = 0.8, -1, -1.2, 1.5, mean 0.025.

    Value: R = 1, V = -0.5, 0.1, 0.5, 2.5 from 0 with range 0.2: squared errors max(2.25, 1.44), 0.81, max(0.25, 0.64) and
    max(2.25, 0.64).
    """
    algorithm, outputs, batch = loss_case()
    loss = algorithm.loss(outputs, batch)
    value_loss = 0.5 * (2.25 + 0.81 + 0.64 + 2.25) / 4
    assert loss.total.item() == pytest.approx(0.025 + 0.5 * value_loss - 0.25 * 2.5, abs=1e-12)
    means = {name: (total / count).item() for name, (total, count) in loss.terms.items()}
    assert means["policy_loss"] == pytest.approx(0.025, abs=1e-12)
    assert means["value_loss"] == pytest.approx(value_loss, abs=1e-12)
    assert means["entropy"] == pytest.approx(2.5, abs=1e-12)


def test_the_loss_is_policy_plus_value_minus_entropy_by_hand():
    check_loss()
    for function, variant in [
        ("clipped_surrogate", broken.clip_takes_the_larger_side),
        ("clipped_surrogate", broken.clip_is_missing),
        ("clipped_surrogate", broken.clip_inverts_the_ratio),
        ("clipped_value_loss", broken.value_clip_has_no_max),
        ("clipped_value_loss", broken.value_loss_has_the_wrong_sign),
        ("clipped_value_loss", broken.value_loss_counts_the_half_twice),
    ]:
        refute(with_broken(function, check_loss), variant)


def check_metrics() -> None:
    """KL(old || policy) = 1/2 log 2 + 1/2 log(2/3), whichever estimator; clipped: only A = -1 at 1/2 and A = 1 at 3/2."""
    algorithm, outputs, batch = loss_case()
    metrics = algorithm.loss(outputs, batch).metrics
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    exact = 0.5 * log(2) + 0.5 * log(2 / 3)
    assert means["policy_kl"] == pytest.approx(exact, abs=1e-12)
    assert means["policy_kl_k1"] == pytest.approx(exact, abs=1e-12)
    assert means["clip_fraction_low"] == 0.25 and means["clip_fraction_high"] == 0.25


def test_the_metrics_are_the_kl_from_old_to_new_and_the_share_without_a_gradient():
    check_metrics()
    for variant in (broken.kl_swaps_its_arguments, broken.kl_has_the_wrong_sign):
        refute(with_broken("kl_estimate", check_metrics), variant)


# --- settings ---


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip_range", 0.0),
        ("clip_range", -0.1),
        ("clip_range_high", 0.0),
        ("dual_clip", 1.0),
        ("value_clip_range", 0.0),
        ("value_coef", -0.1),
        ("entropy_coef", inf),
        ("gamma", 1.01),
        ("gae_lambda", -0.5),
        ("gae_lambda", nan),
        ("kl_coef", -1.0),
        ("kl_target", 0.0),
        ("kl_horizon", 0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(setting, value):
    with pytest.raises(InputError, match=rf"{setting} must be .*{value}"):
        PPOConfig(**{setting: value})


def test_adapting_a_coefficient_of_zero_is_refused():
    with pytest.raises(InputError, match=r"kl_target .*kl_coef"):
        PPOConfig(kl_coef=0.0, kl_target=6.0)


def test_the_algorithm_asks_only_for_what_its_settings_need():
    assert PPO(PPOConfig()).needs == {"values", "reference"}
    assert PPO(PPOConfig(kl_coef=0.0, entropy_coef=0.1)).needs == {"values", "entropy"}
