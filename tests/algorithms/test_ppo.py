"""PPO: rewards to advantages by hand, the loss and its metrics, and what an update must not depend on."""

from dataclasses import replace
from math import inf, log, nan, sqrt

import pytest
import torch
from torch import nn

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.masking import local_sum
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.types import PolicyOutputs, Trajectories, Weighting
from rlhf.update import UpdateConfig, split_minibatch, update
from tests import broken, tree
from tests.controls import names, refute

EXACT = {"rtol": 0, "atol": 1e-12}
T, F = True, False


def f64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def trajectories(**changes) -> Trajectories:
    """Two completions of 3 and 2 tokens; the score, 1 and 2, lies on the last token. Padding holds NaN where it may."""
    mask = torch.tensor([[T, T, T], [T, T, F]])
    last = torch.tensor([[F, F, T], [F, T, F]])
    values = f64([[0.5, 0.25, 0.75], [1.0, 0.5, nan]])
    fields = {
        "inputs": {"states": torch.zeros(2, 3, dtype=torch.int64)},
        "actions": torch.zeros(2, 3, dtype=torch.int64),
        "mask": mask,
        "rewards": f64([[0, 0, 1], [0, 2, 0]]),
        "sampling_logprobs": f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, nan]]),
        "old_logprobs": f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, nan]]),
        "ref_logprobs": f64([[-1.2, -1.4, -0.8], [-1.6, -1.0, nan]]),  # k1 = 0.2, 0.4, -0.2 and 0.6, 0
        "values": values,
        "next_values": f64([[0.25, 0.75, 0], [0.5, 0, nan]]),
        "terminated": last,
        "episode_ends": last,
        "row_tokens": torch.tensor([3, 2]),
        "row_index": torch.arange(2),
    }
    return Trajectories(**{**fields, **changes})


def prepare(config: PPOConfig, given: Trajectories | None = None, progress: float = 0.0, state=None):
    algorithm = PPO(config)
    return algorithm.prepare(
        given or trajectories(), progress, algorithm.initial_state() if state is None else state, local_sum
    )


def with_broken(function: str, check):
    """`check` as a function of a variant of `function` that PPO then uses."""

    def run(variant) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"rlhf.algorithms.ppo.{function}", variant)
            check()

    return run


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
    torch.testing.assert_close(batch.advantages[batch.mask], (raw - 0.7) / sqrt(0.185), rtol=0, atol=1e-7)
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
        loss, _ = PPO(config).loss(PolicyOutputs(logprobs=logprobs, values=batch.old_values), batch)
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
    loss, metrics = algorithm.loss(outputs, batch)
    value_loss = 0.5 * (2.25 + 0.81 + 0.64 + 2.25) / 4
    assert loss.item() == pytest.approx(0.025 + 0.5 * value_loss - 0.25 * 2.5, abs=1e-12)
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
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
    _, metrics = algorithm.loss(outputs, batch)
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    exact = 0.5 * log(2) + 0.5 * log(2 / 3)
    assert means["policy_kl"] == pytest.approx(exact, abs=1e-12)
    assert means["policy_kl_k1"] == pytest.approx(exact, abs=1e-12)
    assert means["clip_fraction_low"] == 0.25 and means["clip_fraction_high"] == 0.25


def test_the_metrics_are_the_kl_from_old_to_new_and_the_share_without_a_gradient():
    check_metrics()
    for variant in (broken.kl_swaps_its_arguments, broken.kl_has_the_wrong_sign):
        refute(with_broken("kl_estimate", check_metrics), variant)


# --- what an update must not depend on ---


class TablePolicy(nn.Module):
    """Logits and a value per state; inputs["states"] is (rows, time)."""

    def __init__(self, states: int = 5, tokens: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(states, tokens, generator=generator, dtype=torch.float64))
        self.values = nn.Parameter(torch.randn(states, generator=generator, dtype=torch.float64))

    def forward(self, inputs, actions, *, with_values: bool, with_entropy: bool) -> PolicyOutputs:
        states = inputs["states"][:, : actions.shape[1]]
        p = self.logits.log_softmax(-1)[states]
        return PolicyOutputs(
            logprobs=p.gather(-1, actions.unsqueeze(-1)).squeeze(-1),
            values=self.values[states] if with_values else None,
            entropy=-(p.exp() * p).sum(-1) if with_entropy else None,
        )

    def weights(self) -> torch.Tensor:
        return torch.cat([self.logits.flatten(), self.values]).detach().clone()


CONFIG = PPOConfig(kl_coef=0.1, entropy_coef=0.01, value_coef=0.5)


def random_trajectories(rows: int = 16, time: int = 6) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, time + 1, (rows,), generator=generator)
    lengths[0] = time
    mask = torch.arange(time) < lengths.unsqueeze(1)
    last = torch.arange(time) == (lengths - 1).unsqueeze(1)
    normal = [torch.randn(rows, time, generator=generator, dtype=torch.float64) for _ in range(5)]
    states = torch.randint(0, 5, (rows, time), generator=generator)
    actions = torch.randint(0, 4, (rows, time), generator=generator)
    with torch.no_grad():  # an old policy some way from the present one, so that the clips act
        old = TablePolicy()({"states": states}, actions, with_values=True, with_entropy=False)
    return trajectories(
        inputs={"states": states},
        actions=actions,
        mask=mask,
        rewards=torch.where(last, normal[0], 0.0),
        sampling_logprobs=old.logprobs,
        old_logprobs=old.logprobs + 0.3 * normal[1],
        ref_logprobs=old.logprobs + 0.2 * normal[2],
        values=old.values + 0.3 * normal[3],
        next_values=torch.where(last, 0.0, normal[4]),
        terminated=last,
        episode_ends=last,
        row_tokens=lengths,
        row_index=torch.arange(rows),
    )


def gradient_of(batch, distributed, *, config: PPOConfig = CONFIG, microbatch_tokens: int = 10**6) -> torch.Tensor:
    """One optimizer step over the whole batch by plain gradient descent with rate 1: minus the change is the gradient."""
    policy = TablePolicy()
    before = policy.weights()
    settings = UpdateConfig(
        num_epochs=1, minibatch_size=batch.rows, microbatch_tokens=microbatch_tokens, max_grad_norm=1e9
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    update(policy, PPO(config), batch, optimizer, settings, distributed, seed=0, step=0)
    return before - policy.weights()


def direct_gradient(batch) -> torch.Tensor:
    """The same from the definition: token means over everything that counts, in one piece."""
    policy = TablePolicy()
    outputs = policy(batch.inputs, batch.actions, with_values=True, with_entropy=True)
    mask, advantages = batch.mask, batch.advantages
    ratio = (outputs.logprobs - batch.old_logprobs)[mask].exp()
    a, v, old, target = advantages[mask], outputs.values[mask], batch.old_values[mask], batch.returns[mask]
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    near = old + (v - old).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2).mean()
    (-surrogate + 0.5 * value - 0.01 * outputs.entropy[mask].mean()).backward()
    return torch.cat([policy.logits.grad.flatten(), policy.values.grad])


CLOSE = {"rtol": 0, "atol": 1e-10}


def test_an_update_follows_the_token_mean_of_the_definition(distributed):
    batch = prepare(CONFIG, random_trajectories())
    torch.testing.assert_close(gradient_of(batch, distributed), direct_gradient(batch), **CLOSE)


@pytest.mark.parametrize("microbatch_tokens", [1, 6, 12, 25, 50, 10**6])
def test_the_gradient_does_not_depend_on_the_microbatches(distributed, microbatch_tokens):
    """From 16 microbatches of one row to one of 16."""
    batch = prepare(CONFIG, random_trajectories())
    pieces = split_minibatch(batch, microbatch_tokens, 0, 1)
    assert sorted(torch.cat([piece.row_index for piece in pieces]).tolist()) == list(range(16))
    assert {1: 16, 10**6: 1}.get(microbatch_tokens, len(pieces)) == len(pieces)
    whole = gradient_of(batch, distributed)
    torch.testing.assert_close(gradient_of(batch, distributed, microbatch_tokens=microbatch_tokens), whole, **CLOSE)


def test_microbatches_keep_to_their_limit_padding_included():
    batch = prepare(CONFIG, random_trajectories())
    for limit in (6, 12, 25, 50):
        for piece in split_minibatch(batch, limit, 0, 1):
            assert piece.rows * int(piece.row_tokens.max()) <= limit
            assert piece.mask[:, -1].any()  # cut to the longest row


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_rows_and_hold_equally_many_microbatches(world_size):
    """The last share may be empty of rows: then a row of weight 0 is computed. Nothing is lost, nothing counts twice."""
    batch = prepare(CONFIG, random_trajectories()).select(torch.arange(4))
    shares = [split_minibatch(batch, 6, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    weight = sum(piece.weightings["policy"].weight.sum() for share in shares for piece in share)
    count = sum(piece.weightings["policy"].count.sum() for share in shares for piece in share)
    assert weight == batch.mask.sum() and count == batch.mask.sum()


def test_the_gradient_does_not_depend_on_the_order_of_rows(distributed):
    batch = prepare(CONFIG, random_trajectories())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = batch.select(order)
    torch.testing.assert_close(gradient_of(shuffled, distributed), gradient_of(batch, distributed), **CLOSE)
    torch.testing.assert_close(
        gradient_of(shuffled, distributed, microbatch_tokens=12), gradient_of(batch, distributed), **CLOSE
    )


def padded(given: Trajectories, width: int, fill: float) -> Trajectories:
    """The same completions with `width` more columns of padding, and `fill` in every masked number."""

    def widen(tensor, value):
        more = tensor.new_full((tensor.shape[0], width), value)
        return torch.cat([tensor, more], 1)

    mask = widen(given.mask, False)
    numbers = ("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values", "next_values")
    return replace(
        given,
        inputs={"states": widen(given.inputs["states"], 0)},
        actions=widen(given.actions, 0),
        mask=mask,
        terminated=widen(given.terminated, False),
        episode_ends=widen(given.episode_ends, False),
        **{name: torch.where(mask, widen(getattr(given, name), 0.0), fill) for name in numbers},
    )


@pytest.mark.parametrize("fill", [0.0, 1e30, inf, -inf, nan])
@pytest.mark.parametrize("width", [0, 3])
def test_padding_and_what_it_holds_change_nothing(distributed, width, fill):
    plain = prepare(CONFIG, random_trajectories())
    wide = prepare(CONFIG, padded(random_trajectories(), width, fill))
    torch.testing.assert_close(wide.advantages[:, :6], plain.advantages, **EXACT)
    torch.testing.assert_close(wide.returns[:, :6], plain.returns, **EXACT)
    assert wide.metrics == pytest.approx(plain.metrics, abs=1e-12)
    for microbatch_tokens in (12, 10**6):
        gradient = gradient_of(wide, distributed, microbatch_tokens=microbatch_tokens)
        torch.testing.assert_close(gradient, gradient_of(plain, distributed), **CLOSE)


def check_independence() -> None:
    """Microbatches and padding at once, for the negative controls below."""
    wide = prepare(CONFIG, padded(random_trajectories(), 2, -inf))
    whole = direct_gradient(prepare(CONFIG, random_trajectories()))
    torch.testing.assert_close(gradient_of(wide, Distributed(), microbatch_tokens=12), whole, **CLOSE)


def test_the_checks_of_independence_notice():
    check_independence()
    for function, variant in [
        ("weighted_sum", broken.weighted_sum_averages_its_own_elements),
        ("weighted_sum", broken.weighted_sum_ignores_the_weights),
        ("clipped_surrogate", broken.clip_masks_after_exp),
    ]:
        with pytest.raises((AssertionError, TrainingError)), pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"rlhf.algorithms.ppo.{function}", variant)
            check_independence()


# --- minibatches ---


class Recorder(PPO):
    """Keeps the minibatches that `update` hands to the loss."""

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.seen: list = []

    def loss(self, outputs, batch):
        self.seen.append(batch)
        return super().loss(outputs, batch)


def test_every_epoch_visits_every_row_once_in_another_order(distributed):
    algorithm, policy = Recorder(CONFIG), TablePolicy()
    settings = UpdateConfig(num_epochs=3, minibatch_size=5)
    update(
        policy,
        algorithm,
        prepare(CONFIG, random_trajectories()),
        torch.optim.SGD(policy.parameters(), 0.0),
        settings,
        distributed,
        seed=0,
        step=0,
    )
    visited = [sorted(piece.row_index.tolist()) for piece in algorithm.seen]
    assert [len(rows) for rows in visited] == [5, 5, 5, 1] * 3
    epochs = [visited[start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(row for rows in epoch for row in rows) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("microbatch_tokens", [6, 10**6])
def test_minibatch_whitening_is_over_each_whole_minibatch(distributed, microbatch_tokens):
    """Mean 0 and variance 1 over the tokens of the minibatch, not of the microbatch or of the batch."""
    config = replace(CONFIG, normalize_advantages="minibatch")
    algorithm, policy = Recorder(config), TablePolicy()
    settings = UpdateConfig(num_epochs=1, minibatch_size=8, microbatch_tokens=microbatch_tokens)
    batch = prepare(config, random_trajectories())
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update(policy, algorithm, batch, optimizer, settings, distributed, seed=0, step=0)
    halves = {}
    for piece in algorithm.seen:
        halves.setdefault(int(piece.denominators["policy"]), []).append(piece.advantages[piece.mask])
    assert len(halves) == 2  # the two minibatches differ in their number of tokens
    for pieces in halves.values():
        advantages = torch.cat(pieces)
        assert advantages.mean().item() == pytest.approx(0, abs=1e-12)
        assert (advantages**2).mean().item() == pytest.approx(1, abs=1e-6)


# --- stopping ---


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_untouched(distributed):
    batch = prepare(CONFIG, random_trajectories())
    for value in (nan, inf):
        poisoned = batch.advantages.clone()
        poisoned[0, 0] = value
        policy = TablePolicy()
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        before = policy.weights()
        with pytest.raises(TrainingError, match=r"step 7.*not finite"):
            update(
                policy,
                PPO(CONFIG),
                replace(batch, advantages=poisoned),
                optimizer,
                UpdateConfig(),
                distributed,
                seed=0,
                step=7,
            )
        assert torch.equal(policy.weights(), before) and not optimizer.state


def check_kl_stop() -> None:
    """8 epochs of full batches at a rate that moves the policy by far more than the target: only the first step is made.

    The batch's old policy is the present one, so the KL is 0 before the first step and large before the second.
    """
    policy, given = TablePolicy(), random_trajectories()
    batch = prepare(CONFIG, replace(given, old_logprobs=given.sampling_logprobs))
    made = {}
    for rate in (1e-6, 30.0):
        settings = UpdateConfig(num_epochs=8, minibatch_size=16, target_kl=0.01, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
        made[rate] = update(policy, PPO(CONFIG), batch, optimizer, settings, Distributed(), seed=0, step=0)[
            "optimizer_steps"
        ]
    assert made == {1e-6: 8.0, 30.0: 1.0}


def test_the_kl_stop_ends_the_step_before_the_update_that_would_follow():
    check_kl_stop()
    for variant in (broken.kl_has_the_wrong_sign, broken.kl_is_zero):
        refute(with_broken("kl_estimate", check_kl_stop), variant)


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
