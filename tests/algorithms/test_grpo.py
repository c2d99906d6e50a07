"""GRPO and its relatives against closed forms: expected gradients over every possible group, by enumeration.

The language of tests/tree.py has 15 sentences, so a group of two is one of 225, and the expected gradient of any estimator
is a finite sum. What it ought to be is the gradient of the exact objective, by autograd.
"""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.presets import PRESETS
from rlhf.core.advantages import group_advantages, return_to_go
from rlhf.core.kl import kl_loss
from rlhf.core.masking import local_sum
from rlhf.errors import InputError
from rlhf.training.steppers import prepare_minibatch
from rlhf.types import PolicyOutputs, Trajectories
from tests import tree

PROBLEM, THETA = tree.random_problem(0)
BETA = PROBLEM.beta
LOO = {"center": "leave_one_out", "scale": "none"}
SUM = {"aggregation": "constant_length", "constant_length": 1}


def trajectories(rows: Tensor, rewards: Tensor, old: Tensor, reference: Tensor | None) -> Trajectories:
    """Sentences `rows` with the given rewards (one per row), as a collector would hand them over."""
    mask = tree.MASK[rows]
    old_logprobs = tree.token_logprobs(old)[rows].detach()
    zeros = torch.zeros_like(old_logprobs)
    ends = tree.ENDS[rows]
    return Trajectories(
        inputs={},
        actions=tree.TOKENS[rows],
        mask=mask,
        rewards=torch.where(ends, rewards.unsqueeze(1), 0.0),
        sampling_logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        values=zeros,
        next_values=zeros,
        terminated=ends,
        episode_ends=ends,
        ref_logprobs=None if reference is None else tree.token_logprobs(reference)[rows],
        row_tokens=mask.sum(-1),
        row_index=torch.arange(len(rows)),
    )


def loss_of(config: GRPOConfig, theta: Tensor, rows: Tensor, rewards: Tensor, old: Tensor | None = None) -> Tensor:
    """GRPO's own loss of one batch, as a function of theta; sampled by `old` (theta itself if not given)."""
    algorithm = GRPO(config)
    reference = PROBLEM.reference if "reference" in algorithm.needs else None
    given = trajectories(rows, rewards, theta.detach() if old is None else old, reference)
    batch = prepare_minibatch(algorithm.prepare(given, 0.0, {}, local_sum), whiten_advantages=False)
    loss = algorithm.loss(PolicyOutputs(logprobs=tree.token_logprobs(theta)[rows]), batch).total
    return loss


def expected_gradient(config: GRPOConfig, theta: Tensor, rewards: Tensor, sampler: Tensor | None = None) -> Tensor:
    """E[-grad loss] over every group that the sampler (theta, if not given) can draw: the direction of the update."""
    theta = theta.clone().requires_grad_()
    chances = tree.sequence_logprobs(theta.detach() if sampler is None else sampler).exp()
    total = torch.zeros(())
    for group in combinations_with_replacement(range(15), config.completions_per_prompt):
        rows = torch.tensor(group)
        orders = math.factorial(len(group)) / math.prod(map(math.factorial, Counter(group).values()))
        total = total - orders * chances[rows].prod() * loss_of(config, theta, rows, rewards[rows], sampler)
    (gradient,) = torch.autograd.grad(total, theta)
    return gradient


def gradient_of(objective, theta: Tensor = THETA) -> Tensor:
    theta = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(theta), theta)
    return gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


MEAN_REWARD = gradient_of(lambda theta: tree.expected(theta, PROBLEM.rewards))
OBJECTIVE = gradient_of(PROBLEM.objective)


# --- what an estimator's expectation is ---


def test_rloo_is_the_gradient_of_the_kl_regularised_objective():
    config = GRPOConfig.preset("rloo", completions_per_prompt=2, kl_coef=BETA)
    torch.testing.assert_close(expected_gradient(config, THETA, PROBLEM.rewards), OBJECTIVE, rtol=0, atol=1e-12)


def test_dr_grpo_is_a_known_multiple_of_the_gradient():
    """(G - 1) / (G C) grad E[R]: the group's mean contains the completion itself."""
    config = GRPOConfig.preset("dr_grpo", completions_per_prompt=2, constant_length=5)
    torch.testing.assert_close(
        expected_gradient(config, THETA, PROBLEM.rewards), MEAN_REWARD / (2 * 5), rtol=0, atol=1e-12
    )


def test_kl_as_a_return_to_go_is_the_gradient_of_the_objective_with_and_without_a_baseline():
    """REINFORCE++'s placement, before its whitening."""
    bare = GRPOConfig.preset("reinforce_pp", whiten_tokens=False, kl_coef=BETA, **SUM)
    torch.testing.assert_close(expected_gradient(bare, THETA, PROBLEM.rewards), OBJECTIVE, rtol=0, atol=1e-12)
    paired = replace(bare, completions_per_prompt=2, center="leave_one_out")
    torch.testing.assert_close(expected_gradient(paired, THETA, PROBLEM.rewards), OBJECTIVE, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "group_token_mean"])
def test_averages_by_length_are_not_parallel_to_the_gradient(aggregation):
    """The length bias of GRPO and, smaller, of the token means; also a negative control of the two tests above."""
    config = GRPOConfig(completions_per_prompt=2, aggregation=aggregation, **LOO)
    assert cosine(expected_gradient(config, THETA, PROBLEM.rewards), MEAN_REWARD) < 0.999


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_group_deviation_weighs_a_binary_reward_by_its_difficulty(ddof):
    """E = E_k[s_k] / (p (1 - p)) grad p, k ~ Binomial(G, p), s_k = sqrt(k/G (1 - k/G)); ddof 1: times sqrt((G - 1) / G)."""
    size, right = 3, torch.zeros(15).double()
    right[torch.tensor([1, 4, 9])] = 1.0
    config = GRPOConfig(completions_per_prompt=size, std_ddof=ddof, std_eps=1e-14, **SUM)
    p = float(tree.expected(THETA, right))
    spread = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k / size * (1 - k / size))
        for k in range(size + 1)
    )
    spread *= math.sqrt((size - 1) / size) if ddof else 1.0
    expected = spread / (p * (1 - p)) * gradient_of(lambda theta: tree.expected(theta, right))
    torch.testing.assert_close(expected_gradient(config, THETA, right), expected, rtol=0, atol=1e-12)


# --- ratios and surrogates ---

RATIOS, SURROGATES = ["token", "sequence_mean", "sequence"], ["clipped", "clipped_weight", "unclipped"]
AGGREGATIONS = ["sequence_mean", "token_mean", "group_token_mean", "constant_length"]
ROWS = torch.tensor([0, 3, 7, 14, 9, 1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("ratio", "surrogate"), list(product(RATIOS, SURROGATES)))
def test_the_first_step_is_the_policy_gradient(ratio, surrogate, aggregation):
    """At theta = old every surrogate has the gradient of A log pi, whatever its ratio."""
    config = GRPOConfig(
        completions_per_prompt=3,
        ratio=ratio,
        surrogate=surrogate,
        aggregation=aggregation,
        constant_length=4,
        dual_clip=3.0,
    )
    plain = replace(config, surrogate="score")
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, wanted = (gradient_of(lambda t, c=c: loss_of(c, t, ROWS, rewards)) for c in (config, plain))
    assert wanted.norm() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_ratio_of_whole_completions_corrects_for_another_sampler():
    """Sampled uniformly, weighted by pi(y) / mu(y): the gradient of E[R] exactly; weighted token by token it is not."""
    sampler = torch.zeros(7, 3).double()
    config = GRPOConfig(
        completions_per_prompt=1, center="none", scale="none", ratio="sequence", surrogate="unclipped", **SUM
    )
    whole = expected_gradient(config, THETA, PROBLEM.rewards, sampler)
    torch.testing.assert_close(whole, MEAN_REWARD, rtol=0, atol=1e-12)
    tokens = expected_gradient(replace(config, ratio="token"), THETA, PROBLEM.rewards, sampler)
    assert (tokens - MEAN_REWARD).abs().max() > 0.01


def other_policy(scale: float = 0.4) -> Tensor:
    return THETA + scale * torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


REWARDS = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def advantages_of(rewards: Tensor, size: int = 3) -> Tensor:
    groups = rewards.view(-1, size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)).flatten()


def test_gspo_is_the_clipped_objective_of_whole_completions():
    """(1/B) sum_i min(s_i A_i, clip(s_i) A_i), s_i = (pi(y) / pi_old(y))^(1/L), clipped rows included (GSPO, eq. 5)."""
    config = GRPOConfig.preset("gspo", completions_per_prompt=3, clip_range=0.1, clip_range_high=0.15)
    old, a = other_policy(), advantages_of(REWARDS)

    def formula(theta: Tensor) -> Tensor:
        s = ((tree.sequence_logprobs(theta) - tree.sequence_logprobs(old))[ROWS] / tree.LENGTHS[ROWS]).exp()
        clipped = s.clamp(0.9, 1.15)
        assert ((s * a > clipped * a).sum() > 0) and (s * a <= clipped * a).sum() > 0  # some clipped, some not
        return -torch.min(s * a, clipped * a).mean()

    torch.testing.assert_close(loss_of(config, THETA, ROWS, REWARDS, old), formula(THETA), rtol=0, atol=1e-12)
    got = gradient_of(lambda theta: loss_of(config, theta, ROWS, REWARDS, old))
    torch.testing.assert_close(got, gradient_of(formula), rtol=0, atol=1e-12)


def test_cispo_limits_the_weight_and_keeps_every_tokens_gradient():
    """-(1/N) sum sg(min(r, 1 + high)) A log pi (MiniMax-M1, eq. 4)."""
    config = GRPOConfig.preset("cispo", completions_per_prompt=3, clip_range_high=0.2)
    old, a, mask = other_policy(), advantages_of(REWARDS), tree.MASK[ROWS]

    def formula(theta: Tensor) -> Tensor:
        logprobs = tree.token_logprobs(theta)[ROWS]
        weight = (logprobs - tree.token_logprobs(old)[ROWS]).detach().exp().clamp(max=1.2)
        assert (weight[mask] == 1.2).any() and (weight[mask] < 0.8).any()
        return -(weight * a.unsqueeze(1) * logprobs)[mask].sum() / mask.sum()

    got = gradient_of(lambda theta: loss_of(config, theta, ROWS, REWARDS, old))
    torch.testing.assert_close(got, gradient_of(formula), rtol=0, atol=1e-12)


def test_aggregations_on_the_hand_example():
    """Losses 1 on eight tokens and 3 on two: 1.4 over tokens, 2 over completions, 14 / 10 / 2 over a constant of ten."""
    lengths, per_token = torch.tensor([8, 2]), torch.tensor([1.0, 3.0]).double()
    mask = torch.arange(8) < lengths.unsqueeze(1)
    for aggregation, size, expected in [
        ("token_mean", 2, 1.4),
        ("sequence_mean", 2, 2.0),
        ("constant_length", 2, 0.7),
        ("group_token_mean", 2, 1.4),  # one group
        ("group_token_mean", 1, 2.0),  # each a group of its own
    ]:
        config = GRPOConfig(
            completions_per_prompt=size, center="none", scale="none", aggregation=aggregation, constant_length=10
        )
        weighting = GRPO(config)._weighting(mask, mask, torch.float64)
        total = (weighting.weight * per_token.unsqueeze(1)).sum() / weighting.count.sum()
        assert float(total) == pytest.approx(expected, abs=1e-12), aggregation


# --- the KL to the reference ---


def fixed_point_of_k3(problem: tree.Problem) -> Tensor:
    """Log-probs of pi = beta ref / (lambda - R), lambda > max R so that it sums to 1: where k3 as a loss balances the
    reward (arXiv 2502.18548)."""
    ref = tree.sequence_logprobs(problem.reference).exp()
    low, high = float(problem.rewards.max()) + 1e-12, float(problem.rewards.max()) + problem.beta
    for _ in range(200):
        middle = (low + high) / 2
        too_much = float((problem.beta * ref / (middle - problem.rewards)).sum()) > 1
        low, high = (middle, high) if too_much else (low, middle)
    return (problem.beta * ref / (high - problem.rewards)).log()


def logits_for(sequence_logprobs: Tensor) -> Tensor:
    """(7, 3) logits of the policy with these log-probs of the 15 sentences."""
    table = torch.full((7, 3), -torch.inf).double()
    for i, sequence in enumerate(tree.SEQUENCES):
        for t, token in enumerate(sequence):
            state = tree.PREFIXES.index(sequence[:t])
            table[state, token] = torch.logaddexp(table[state, token], sequence_logprobs[i])
    return table.log_softmax(-1)


WITH_KL = {**LOO, **SUM, "completions_per_prompt": 2, "kl_coef": BETA}
PLACEMENTS = {
    "k1 off the score": {"kl_placement": "score"},
    "k1 as a return-to-go": {"kl_placement": "return_to_go"},
    "sequence k2": {"kl_estimator": "sequence_k2"},
    "sequence k3": {"kl_estimator": "sequence_k3"},
    "token k2": {"kl_estimator": "k2"},
    "token k3": {"kl_estimator": "k3"},
    "weighted k3": {"kl_estimator": "weighted_k3"},
}
AT_OPTIMUM = {"k1 off the score", "k1 as a return-to-go", "sequence k2"}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_which_placement_of_the_kl_rests_at_the_optimum(name):
    config = GRPOConfig(**WITH_KL, **PLACEMENTS[name])
    at_optimum = expected_gradient(config, PROBLEM.best_logits(), PROBLEM.rewards).abs().max()
    at_k3 = expected_gradient(config, logits_for(fixed_point_of_k3(PROBLEM)), PROBLEM.rewards).abs().max()
    assert at_optimum == pytest.approx(0, abs=1e-12) if name in AT_OPTIMUM else at_optimum > 1e-3
    assert at_k3 == pytest.approx(0, abs=1e-10) if name == "sequence k3" else at_k3 > 1e-3


def test_at_the_optimum_every_advantage_of_rloo_is_exactly_zero():
    """R(y) - beta log pi*(y) / ref(y) = beta log Z for every y: the fixed point is free of noise."""
    algorithm = GRPO(GRPOConfig.preset("rloo", completions_per_prompt=5, kl_coef=BETA))
    given = trajectories(torch.arange(15), PROBLEM.rewards, PROBLEM.best_logits(), PROBLEM.reference)
    assert (algorithm.prepare(given, 0.0, {}, local_sum).advantages == 0).all()
    elsewhere = trajectories(torch.arange(15), PROBLEM.rewards, THETA, PROBLEM.reference)
    assert algorithm.prepare(elsewhere, 0.0, {}, local_sum).advantages.abs().max() > 0.1


def test_weighted_k3_has_the_gradient_of_the_kl_for_any_sampler_of_one_token():
    """E_old[grad(r k3)] = grad KL(pi || ref); without the ratio's gradient it is another one (a bandit of four arms)."""
    generator = torch.Generator().manual_seed(3)
    ref, old, theta = (torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(3))

    def loss(theta: Tensor, attached: bool) -> Tensor:
        logprobs = theta.log_softmax(0)
        ratio = (logprobs - old).exp()
        elements = kl_loss(
            logprobs.unsqueeze(1),
            ref.unsqueeze(1),
            (ratio if attached else ratio.detach()).unsqueeze(1),
            torch.ones(4, 1).bool(),
            "weighted_k3",
        )
        return (old.exp() * elements.squeeze(1)).sum()

    exact = gradient_of(lambda t: tree.kl(t.log_softmax(0), ref), theta)
    torch.testing.assert_close(gradient_of(lambda t: loss(t, True), theta), exact, rtol=0, atol=1e-12)
    assert (gradient_of(lambda t: loss(t, False), theta) - exact).abs().max() > 0.01


# --- advantages ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -1e6 / 3])
@pytest.mark.parametrize("center", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_equal_scores_have_advantage_exactly_zero(scale, center, value, dtype):
    scores = torch.tensor([value] * 8 + [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=dtype)
    got = group_advantages(scores, 8, center=center, scale=scale, std_ddof=1, std_eps=1e-8)
    assert (got[:8] == 0).all() and (got[8:] != 0).all()


def test_advantages_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]).double()

    def of(center, scale, ddof=0):
        return group_advantages(scores, 3, center=center, scale=scale, std_ddof=ddof, std_eps=0.0).tolist()

    assert of("group_mean", "none") == pytest.approx([-2, -1, 3, -1, -1, 2])
    assert of("leave_one_out", "none") == pytest.approx([-3, -1.5, 4.5, -1.5, -1.5, 3])  # 1 - (2 + 6) / 2 = -3
    assert of("none", "none") == scores.tolist()
    first, second = math.sqrt(14 / 3), math.sqrt(6 / 3)
    assert of("group_mean", "group_std") == pytest.approx(
        [-2 / first, -1 / first, 3 / first, -1 / second, -1 / second, 2 / second]
    )
    assert of("group_mean", "group_std", 1)[:3] == pytest.approx([x / math.sqrt(7) for x in (-2, -1, 3)])
    whole = math.sqrt(50 / 6 - 4)  # mean 2, mean square 50 / 6
    assert of("group_mean", "batch_std") == pytest.approx([x / whole for x in (-2, -1, 3, -1, -1, 2)])


def test_completions_without_a_score_are_left_out_of_the_comparison():
    scores = torch.tensor([1.0, 99.0, 3.0, 5.0, 5.0, 99.0]).double()
    scored = torch.tensor([True, False, True, True, False, False])
    for center, expected in [("group_mean", [-1, 0, 1, 0, 0, 0]), ("leave_one_out", [-2, 0, 2, 0, 0, 0])]:
        got = group_advantages(scores, 3, center=center, scale="none", std_ddof=0, std_eps=1e-6, scored=scored)
        assert got.tolist() == expected
    got = group_advantages(scores, 3, center="group_mean", scale="group_std", std_ddof=0, std_eps=0.0, scored=scored)
    assert got.nan_to_num(0.0).tolist() == [-1, 0, 1, 0, 0, 0]


def test_groups_that_were_torn_apart_are_refused():
    with pytest.raises(ValueError, match="whole groups: got 7 scores"):
        group_advantages(torch.zeros(7), 3, center="group_mean", scale="none", std_ddof=0, std_eps=1e-6)


def test_return_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, torch.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert return_to_go(rewards, mask).tolist() == [[7, 6, 4], [24, 16, 0]]


def test_whitening_over_tokens_is_over_the_tokens_that_learn():
    """REINFORCE++: mean 0 and deviation 1 over tokens, of rewards with the KL of the tokens to come."""
    algorithm = GRPO(GRPOConfig.preset("reinforce_pp", kl_coef=0.3))
    batch = algorithm.prepare(
        trajectories(torch.arange(15), PROBLEM.rewards, THETA, PROBLEM.reference), 0.0, {}, local_sum
    )
    chosen = batch.advantages[tree.MASK]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-12)
    assert float(chosen.std(correction=0)) == pytest.approx(1, abs=1e-6)
    k1 = tree.token_logprobs(THETA) - tree.token_logprobs(PROBLEM.reference)
    raw = torch.stack([PROBLEM.rewards - 0.3 * k1[:, t:].sum(1) for t in range(3)], 1)[tree.MASK]
    torch.testing.assert_close(chosen, (raw - raw.mean()) / raw.std(correction=0), rtol=1e-6, atol=1e-9)


# --- settings ---


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_set_of_settings(name):
    config = GRPOConfig.preset(name)
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())
    assert GRPOConfig.preset(name, entropy_coef=0.25) == replace(config, entropy_coef=0.25)


def test_the_presets_published_values():
    """Spot checks against the papers: DAPO's clip-higher, GSPO's narrow clip, GRPO's KL."""
    dapo, gspo, grpo = (GRPOConfig.preset(name) for name in ("dapo", "gspo", "grpo"))
    assert (dapo.clip_range, dapo.clip_range_high, dapo.kl_coef) == (0.2, 0.28, 0.0)
    assert (gspo.clip_range, gspo.clip_range_high, gspo.ratio) == (3e-4, 4e-4, "sequence_mean")
    assert (grpo.kl_coef, grpo.kl_estimator, grpo.completions_per_prompt) == (0.04, "k3", 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completions_per_prompt": 1}, "completions_per_prompt=1: a group of one"),
        ({"completions_per_prompt": 0}, "completions_per_prompt must be 1 or more, got 0"),
        ({"kl_coef": -0.1}, "kl_coef must be 0 or more"),
        ({"kl_coef": math.inf}, "kl_coef must be 0 or more"),
        ({"clip_range": 0.0}, "clip_range must be above 0"),
        ({"std_eps": 0.0}, "std_eps must be above 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"constant_length": 0}, "constant_length must be 1 or more"),
        ({"center": "median"}, "center"),
        ({"std_ddof": 2}, "std_ddof"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GRPOConfig(**settings)


def test_unknown_presets_are_refused_by_name():
    with pytest.raises(InputError, match=r"preset='drgrpo' is unknown.*dr_grpo"):
        GRPOConfig.preset("drgrpo")
