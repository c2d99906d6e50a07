"""TRPO's policy step: the closed forms of a bandit, what bounds it, what it must not depend on, and the value loss."""

import copy
from dataclasses import dataclass, replace
from math import inf, nan, sqrt

import pytest
import torch
from torch import nn

from rlhf.algorithms.ppo import PPOConfig
from rlhf.algorithms.trpo import TRPO, TrustRegionConfig
from rlhf.core.masking import local_sum
from rlhf.core.trust_region import conjugate_gradient, fisher_vector_product, flatten, line_search, step_size
from rlhf.errors import InputError, TrainingError
from rlhf.runs.metrics import unknown_names
from rlhf.training.update import UpdateConfig
from rlhf.types import PolicyOutputs, TrainingBatch, Trajectories, Weighting
from tests.controls import names, refute, run_ranks
from tests.updates import update

EXACT = {"rtol": 0, "atol": 1e-12}
CLOSE = {"rtol": 0, "atol": 1e-10}
CONFIG = PPOConfig(kl_coef=0.0, value_coef=0.5, value_clip_range=None)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of logits along the last dimension."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class Group:
    """A process's view of the others, here threads."""

    rank: int = 0
    world_size: int = 1
    all_sum: object = staticmethod(local_sum)


class Policy(nn.Module):
    """Categorical actions from `policy_net`, values from `value_net`; observations (rows, n), outputs (rows, 1)."""

    def __init__(self, policy_net: nn.Module, value_net: nn.Module, *, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.policy_net, self.value_net = trunk or nn.Identity(), policy_net, value_net
        self.divergence = kl

    def logits(self, observations):
        return self.policy_net(self.trunk(observations))

    def forward(self, inputs, actions, with_values=True, with_entropy=False, old_distribution=None):
        observations = inputs["observations"]
        logprobs = self.logits(observations).log_softmax(-1).unsqueeze(1)
        return PolicyOutputs(
            logprobs=logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1),
            values=self.value_net(self.trunk(observations)) if with_values else None,
            entropy=-(logprobs.exp() * logprobs).sum(-1) if with_entropy else None,
            distribution=logprobs,
            kl=None if old_distribution is None else self.divergence(old_distribution, logprobs),
        )


def training_batch(policy, observations, actions, advantages, weight=None, **changes) -> TrainingBatch:
    """A batch whose old policy is `policy` now; returns are 1 above the values."""
    rows = len(observations)
    with torch.no_grad():
        outputs = policy({"observations": observations}, actions)
    weight = torch.ones(rows, 1, dtype=observations.dtype) if weight is None else weight
    weighting = Weighting(weight, weight.sum(-1))
    fields = {
        "inputs": {"observations": observations},
        "actions": actions,
        "mask": weight != 0,
        "old_logprobs": outputs.logprobs,
        "sampling_logprobs": outputs.logprobs,
        "advantages": advantages,
        "returns": outputs.values + 1,
        "old_values": outputs.values,
        "old_distribution": outputs.distribution,
        "row_tokens": torch.ones(rows, dtype=torch.int64),
        "row_index": torch.arange(rows),
        "weightings": {"policy": weighting, "value": weighting, "entropy": weighting},
        "coefficients": {"clip_low": 0.2, "clip_high": 0.2, "penalty_coef": 0.0},
    }
    return TrainingBatch(**{**fields, **changes})


LOGITS = f64([0.3, -1.2, 0.8, 0.1, -0.4])
REWARDS = f64([1.0, -0.5, 0.25, 2.0, -1.5])
P = LOGITS.softmax(0)
FISHER = P.diag() - P.outer(P)
EYE = torch.eye(5, dtype=torch.float64)


def bandit(logits=LOGITS, rewards=REWARDS) -> tuple[Policy, TrainingBatch]:
    """Every action once, weighted by its probability: the mean over the batch is the exact expectation."""
    policy = Policy(nn.Linear(1, 5, bias=False), nn.Linear(1, 1)).double()
    with torch.no_grad():
        policy.policy_net.weight.copy_(logits.unsqueeze(1))
    ones = torch.ones(5, 1, dtype=torch.float64)
    weight = logits.softmax(0).unsqueeze(1)
    return policy, training_batch(policy, ones, torch.arange(5).unsqueeze(1), rewards.unsqueeze(1), weight)


def mlp_problem(rows=40, seed=0, scale=1.0) -> tuple[Policy, TrainingBatch]:
    torch.manual_seed(seed)
    policy = Policy(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)),
    ).double()
    with torch.no_grad():
        policy.policy_net[-1].weight.mul_(scale)
    observations = torch.randn(rows, 3, dtype=torch.float64)
    actions = torch.randint(4, (rows, 1))
    return policy, training_batch(policy, observations, actions, torch.randn(rows, 1, dtype=torch.float64))


def step(policy, batch, config=CONFIG, group=None, **trust_region) -> dict[str, float]:
    return TRPO(config, TrustRegionConfig(**trust_region)).full_batch_step(policy, batch, group or Group())


def weights(module: nn.Module) -> torch.Tensor:
    return flatten([p.detach() for p in module.parameters()])


def with_broken(function: str, check):
    """`check` as a function of a variant of `function` that TRPO then uses."""

    def run(variant) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"rlhf.algorithms.trpo.{function}", variant)
            check()

    return run


# --- the step itself, in closed form (D12) ---


@pytest.mark.parametrize("max_kl", [1e-2, 1e-4, 1e-6])
def test_without_damping_the_policy_is_tilted_exponentially_by_the_advantage(max_kl):
    """p exp(eta R) / Z, eta = sqrt(2 delta / Var_p R), and the gain is what the tilted policy earns more."""
    policy, batch = bandit()
    metrics = step(policy, batch, max_kl=max_kl, damping=0.0)
    centred = REWARDS - P @ REWARDS
    tilted = P * (sqrt(2 * max_kl / (P @ centred**2).item()) * REWARDS).exp()
    tilted = tilted / tilted.sum()
    torch.testing.assert_close(policy.policy_net.weight.detach().squeeze(1).softmax(0), tilted, **CLOSE)
    assert metrics["line_search_accepted"] == 1 and metrics["line_search_steps"] == 0
    assert metrics["trust_region_kl"] == pytest.approx((P * (P / tilted).log()).sum().item(), abs=1e-12)
    assert metrics["surrogate_gain"] == pytest.approx(((tilted - P) @ REWARDS).item(), abs=1e-10)


def check_damped_step() -> None:
    """theta_old + sqrt(2 delta / g^T H^-1 g) H^-1 g with H = F + damping I, by a linear solve."""
    for damping in (0.01, 0.5):
        policy, batch = bandit()
        step(policy, batch, max_kl=1e-3, damping=damping)
        gradient = FISHER @ REWARDS
        natural = torch.linalg.solve(FISHER + damping * EYE, gradient)
        expected = LOGITS + (2e-3 / (gradient @ natural)).sqrt() * natural
        torch.testing.assert_close(policy.policy_net.weight.detach().squeeze(1), expected, rtol=0, atol=1e-6)


def test_with_damping_the_step_is_that_of_a_linear_solve_and_its_length_counts_the_damping():
    check_damped_step()


def size_forgets_the_damping(direction, curved, *, max_kl):
    return step_size(direction, FISHER @ direction, max_kl=max_kl)


def size_forgets_the_root(direction, curved, *, max_kl):
    return step_size(direction, curved, max_kl=max_kl) ** 2


def size_forgets_the_two(direction, curved, *, max_kl):
    return step_size(direction, curved, max_kl=max_kl / 2)


def cg_is_plain_gradient(product, b, **kw):
    return b


def product_forgets_the_damping(mean_kl, parameters, *, damping, **kw):
    return fisher_vector_product(mean_kl, parameters, damping=0.0, **kw)


STEPS = [
    ("step_size", size_forgets_the_damping),
    ("step_size", size_forgets_the_root),
    ("step_size", size_forgets_the_two),
    ("conjugate_gradient", cg_is_plain_gradient),
    ("fisher_vector_product", product_forgets_the_damping),
]


@pytest.mark.parametrize(("function", "variant"), STEPS, ids=names([v for _, v in STEPS]))
def test_the_check_of_the_damped_step_notices(function, variant):
    refute(with_broken(function, check_damped_step), variant)


def check_scale_of_the_advantages() -> None:
    """The trust region alone decides how far the step goes."""
    stepped = []
    for scale in (1.0, 1e-7, 1e5):
        policy, batch = mlp_problem()
        step(policy, replace(batch, advantages=scale * batch.advantages))
        stepped.append(weights(policy))
    torch.testing.assert_close(stepped[1], stepped[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(stepped[2], stepped[0], rtol=0, atol=1e-8)


def test_the_scale_of_the_advantages_does_not_matter():
    check_scale_of_the_advantages()


def cg_with_absolute_tolerance(product, b, *, iterations):
    return conjugate_gradient(product, b, iterations=iterations, tolerance=1e-10 / (b @ b).item())


def test_the_check_of_the_scale_notices():
    refute(with_broken("conjugate_gradient", check_scale_of_the_advantages), cg_with_absolute_tolerance)


def test_one_iteration_of_conjugate_gradient_goes_along_the_gradient_and_more_of_them_solve():
    """cg_residual is |H s - g| / |g|: for one iteration s = (g.g / g.Hg) g."""
    policy, batch = bandit()
    metrics = step(policy, batch, max_kl=1e-4, damping=0.1, cg_iterations=1)
    gradient, damped = FISHER @ REWARDS, FISHER + 0.1 * EYE
    moved = policy.policy_net.weight.detach().squeeze(1) - LOGITS
    torch.testing.assert_close(moved / moved.norm(), gradient / gradient.norm(), **CLOSE)
    solution = gradient @ gradient / (gradient @ damped @ gradient) * gradient
    residual = ((damped @ solution - gradient).norm() / gradient.norm()).item()
    assert metrics["cg_residual"] == pytest.approx(residual, abs=1e-12) and residual > 0.05
    policy, batch = bandit()
    assert step(policy, batch, max_kl=1e-4, damping=0.1)["cg_residual"] < 1e-5


def test_the_entropy_bonus_is_part_of_what_the_step_improves():
    """Without advantages the natural gradient of the entropy is -log p (up to a constant): the policy is flattened."""
    policy, batch = bandit(rewards=torch.zeros(5, dtype=torch.float64))
    metrics = step(policy, batch, replace(CONFIG, entropy_coef=0.01), damping=0.0, max_kl=1e-4)
    surprise = -P.log()
    eta = 0.8 ** metrics["line_search_steps"] * sqrt(2e-4 / (P @ (surprise - P @ surprise) ** 2).item())
    expected = (LOGITS + eta * surprise).softmax(0)
    new = policy.policy_net.weight.detach().squeeze(1).softmax(0)
    torch.testing.assert_close(new, expected, **CLOSE)
    gained = 0.01 * ((P * P.log()).sum() - (new * new.log()).sum()).item()
    assert metrics["surrogate_gain"] == pytest.approx(gained, abs=1e-12) and gained > 0
    assert "entropy" in TRPO(replace(CONFIG, entropy_coef=0.01)).needs and "entropy" not in TRPO(CONFIG).needs


def test_repeated_steps_solve_the_bandit():
    policy, batch = bandit()
    for _ in range(20):
        p = policy.policy_net.weight.detach().squeeze(1)
        _, batch = bandit(p)
        step(policy, batch, max_kl=0.1, damping=1e-3)
    assert policy.policy_net.weight.detach().squeeze(1).softmax(0)[3] > 0.95


# --- what bounds it ---


def check_random_problems() -> None:
    """mean(ratio A) never falls and mean KL(old || new) <= max_kl, both computed here; or nothing has changed."""
    shortened = 0
    for seed in range(8):
        policy, batch = mlp_problem(seed=seed, scale=1.0 + 3 * (seed % 3))
        before = weights(policy)
        metrics = step(policy, batch, max_kl=0.05, damping=1e-4, backtracks=4)
        with torch.no_grad():
            outputs = policy(batch.inputs, batch.actions)
            divergence = kl(batch.old_distribution, outputs.distribution).mean().item()
        ratio = (outputs.logprobs - batch.old_logprobs).exp()
        gain = ((ratio - 1) * batch.advantages).mean().item()
        assert divergence <= 0.05
        assert gain >= 0
        if metrics["line_search_accepted"]:
            assert metrics["trust_region_kl"] == pytest.approx(divergence, abs=1e-12)
            assert metrics["surrogate_gain"] == pytest.approx(gain, abs=1e-12) and gain > 0
        else:
            assert torch.equal(weights(policy), before) and metrics["trust_region_kl"] == metrics["surrogate_gain"] == 0
        shortened += metrics["line_search_steps"] > 0
    assert shortened > 0  # else the bound would not have mattered


def test_on_random_problems_the_surrogate_rises_within_the_trust_region():
    check_random_problems()


def search_takes_the_whole_step(parameters, step, evaluate, *, max_backtracks, **kw):
    return line_search(parameters, step, evaluate, **{**kw, "max_kl": inf}, max_backtracks=0)


def search_moves_on_after_its_choice(parameters, step, evaluate, **kw):
    found = line_search(parameters, step, evaluate, **kw)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    return found


SEARCHES = [search_takes_the_whole_step, search_moves_on_after_its_choice]


@pytest.mark.parametrize("variant", SEARCHES, ids=names(SEARCHES))
def test_the_check_of_random_problems_notices(variant):
    refute(with_broken("line_search", check_random_problems), variant)


RARE, GOOD = f64([0, 0, 0, -4.0, 0]), f64([0, 0, 0, 1.0, 0])
"""Logits and rewards of a bandit whose good action is rare: the quadratic model underrates the KL of going there."""


def check_restored() -> None:
    """The whole step breaks the bound and there are no backtracks: every bit of the policy is as before."""
    policy, batch = bandit(RARE, GOOD)
    before = weights(policy)
    metrics = step(policy, batch, max_kl=0.01, damping=0.0, backtracks=0)
    assert metrics["line_search_accepted"] == 0 and metrics["trust_region_kl"] == 0 and metrics["surrogate_gain"] == 0
    assert torch.equal(weights(policy).view(torch.int64), before.view(torch.int64))


def test_without_an_acceptable_step_the_policy_stays_as_it_was_bit_for_bit():
    check_restored()


def search_keeps_the_last_candidate(parameters, step, evaluate, *, decay, max_backtracks, **kw):
    found = line_search(parameters, step, evaluate, decay=decay, max_backtracks=max_backtracks, **kw)
    if not found.accepted:
        with torch.no_grad():
            pieces = step.split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.add_(decay**max_backtracks * piece.view(parameter.shape))
    return found


def test_the_check_of_restoring_notices():
    refute(with_broken("line_search", check_restored), search_keeps_the_last_candidate)


def check_direction_of_the_kl(divergence) -> None:
    """The step is the first of decay^j eta R whose KL(old || new) keeps to the bound; KL(new || old) would take another."""
    for decay in (0.8, 0.9):
        policy, batch = bandit(RARE, GOOD)
        policy.divergence = divergence
        metrics = step(policy, batch, max_kl=0.01, damping=0.0, backtrack_decay=decay)
        p = RARE.softmax(0)
        eta = sqrt(0.02 / (p @ (GOOD - p @ GOOD) ** 2).item())
        within = [j for j in range(11) if kl(RARE, RARE + decay**j * eta * GOOD) <= 0.01]
        assert metrics["line_search_steps"] == within[0] > 0


def test_the_kl_that_is_bounded_goes_from_the_old_policy_to_the_new():
    check_direction_of_the_kl(kl)


def test_the_check_of_the_direction_notices():
    refute(check_direction_of_the_kl, lambda p, q: kl(q, p))


# --- what must not matter ---


def check_processes(world_size=2) -> None:
    """Processes that each compute their share of 7 rows end with the parameters of one that computes them all."""
    alone, batch = mlp_problem(rows=7)
    others = [copy.deepcopy(alone) for _ in range(world_size)]
    config = replace(CONFIG, entropy_coef=0.02)
    settings = {"fisher_subsample": 2, "max_kl": 0.02}
    metrics = step(alone, batch, config, **settings)

    def work(rank, all_sum):
        return step(others[rank], batch, config, Group(rank, world_size, all_sum), **settings)

    results = run_ranks(work, world_size)
    for other, result in zip(others, results, strict=True):
        assert result is not None  # the thread did not fail
        torch.testing.assert_close(weights(other), weights(alone), rtol=0, atol=1e-9)
        assert result == pytest.approx(metrics, abs=1e-9)
        assert torch.equal(weights(other), weights(others[0]))


@pytest.mark.parametrize("world_size", [2, 3, 9])  # 9: some have no rows, and still take part in every sum
def test_several_processes_step_as_one(world_size):
    check_processes(world_size)


def product_of_the_own_share(mean_kl, parameters, *, damping, all_sum):
    return fisher_vector_product(mean_kl, parameters, damping=damping)


def product_damped_on_every_process(mean_kl, parameters, *, damping, all_sum):
    product = fisher_vector_product(mean_kl, parameters, damping=damping)
    return lambda vector: all_sum(product(vector))


PROCESSES = [product_of_the_own_share, product_damped_on_every_process]


@pytest.mark.parametrize("variant", PROCESSES, ids=names(PROCESSES))
def test_the_check_of_several_processes_notices(variant):
    refute(with_broken("fisher_vector_product", check_processes), variant)


def with_ghosts(batch: TrainingBatch, weight: float) -> TrainingBatch:
    """Every third row is a ghost: nothing but NaN, with the given weight."""

    def spread(tensor):
        ghost = torch.full_like(tensor[:1], nan if tensor.is_floating_point() else 0)
        rows = [row for start in range(0, len(tensor), 2) for row in (*tensor[start : start + 2].split(1), ghost)]
        return torch.cat(rows)

    given, batch = batch.weightings["policy"], batch.map_rows(spread)
    filled = torch.full_like(given.weight[:1], weight)
    rows = [
        row for start in range(0, len(given.weight), 2) for row in (*given.weight[start : start + 2].split(1), filled)
    ]
    weights = torch.cat(rows)
    weighting = Weighting(weights, weights.sum(-1))
    return replace(batch, weightings=dict.fromkeys(batch.weightings, weighting), mask=weights != 0)


def test_ghost_rows_change_nothing_whatever_they_hold():
    clean, batch = mlp_problem(rows=12)
    haunted = copy.deepcopy(clean)
    metrics = step(clean, batch)
    assert step(haunted, with_ghosts(batch, 0.0)) == pytest.approx(metrics, abs=1e-12)
    torch.testing.assert_close(weights(haunted), weights(clean), **EXACT)


def test_the_same_rows_stop_the_run_if_they_count():
    policy, batch = mlp_problem(rows=12)
    with pytest.raises(TrainingError, match="not finite"):
        step(policy, with_ghosts(batch, 1.0))


def test_a_batch_of_ghosts_alone_moves_nothing():
    policy, batch = mlp_problem(rows=4)
    before = weights(policy)
    none = Weighting(torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    assert step(policy, replace(batch, weightings=dict.fromkeys(batch.weightings, none))) == {}
    assert torch.equal(weights(policy), before)


def test_weights_weigh_rows_as_repeating_them_would():
    weighted, batch = mlp_problem(rows=6)
    repeated = copy.deepcopy(weighted)
    weight = f64([[1.0], [2.0], [1.0], [3.0], [1.0], [2.0]])
    weighting = Weighting(weight, weight.sum(-1))
    step(weighted, replace(batch, weightings=dict.fromkeys(batch.weightings, weighting)))
    step(repeated, batch.select(torch.arange(6).repeat_interleave(weight.squeeze(1).long())))
    torch.testing.assert_close(weights(repeated), weights(weighted), **CLOSE)


def test_means_divide_by_the_counts_of_the_batch():
    """Counts twice as large halve every mean: half the KL, so the step reaches what twice the bound would allow."""
    counted, batch = mlp_problem(rows=10)
    allowed = copy.deepcopy(counted)
    given = batch.weightings["policy"]
    doubled = dict.fromkeys(batch.weightings, Weighting(given.weight, 2 * given.count))
    halves = step(counted, replace(batch, weightings=doubled), max_kl=0.01, damping=0.05)
    wholes = step(allowed, batch, max_kl=0.02, damping=0.1)
    torch.testing.assert_close(weights(counted), weights(allowed), **CLOSE)
    for name in ("trust_region_kl", "surrogate_gain"):
        assert 2 * halves[name] == pytest.approx(wholes[name], abs=1e-10)


def test_every_nth_transition_is_used_for_the_fisher_matrix_and_all_for_the_rest():
    """With every row twice, half of them give the same matrix; with different rows another step, still within the bound."""
    policies = [mlp_problem(rows=10)[0] for _ in range(4)]
    _, batch = mlp_problem(rows=10)
    twice = batch.select(torch.arange(10).repeat_interleave(2))
    for policy, given, every in zip(policies, [batch, twice, twice, batch], [1, 1, 2, 2], strict=True):
        metrics = step(policy, given, fisher_subsample=every)
        with torch.no_grad():
            new = policy(batch.inputs, batch.actions).distribution
        exact = kl(batch.old_distribution, new).mean().item()
        assert metrics["trust_region_kl"] == pytest.approx(exact, abs=1e-12) and exact <= 0.01
    torch.testing.assert_close(weights(policies[1]), weights(policies[0]), **CLOSE)
    torch.testing.assert_close(weights(policies[2]), weights(policies[0]), **CLOSE)
    assert (weights(policies[3]) - weights(policies[0])).abs().max() > 1e-4


def test_the_policy_step_leaves_the_values_and_all_gradients_alone():
    policy, batch = mlp_problem()
    values, acting = weights(policy.value_net), weights(policy.policy_net)
    step(policy, batch)
    assert torch.equal(weights(policy.value_net), values) and not torch.equal(weights(policy.policy_net), acting)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_equal_advantages_of_zero_move_nothing():
    policy, batch = mlp_problem()
    before = weights(policy)
    metrics = step(policy, replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert metrics["line_search_accepted"] == 0 and torch.equal(weights(policy), before)
    assert all(value == value for value in metrics.values())  # no NaN


# --- the value loss and the whole update ---


def test_the_loss_is_that_of_the_values_and_gives_the_policy_no_gradient():
    """0.5 * 0.5 (V - R)^2 with R = V + 1: 0.25 and a gradient of -0.5 / rows to each value."""
    policy, batch = mlp_problem(rows=8)
    outputs = policy(batch.inputs, batch.actions)
    outputs.values.retain_grad()
    whole = replace(batch, denominators={name: w.count.sum() for name, w in batch.weightings.items()})
    loss = TRPO(CONFIG).loss(outputs, whole)
    assert loss.total.item() == pytest.approx(0.25, abs=1e-12)
    loss.total.backward()
    torch.testing.assert_close(outputs.values.grad, torch.full_like(outputs.values, -0.5 / 8), **EXACT)
    assert all(parameter.grad is None for parameter in policy.policy_net.parameters())
    assert all(parameter.grad is not None for parameter in policy.value_net.parameters())
    assert "value_loss" in loss.terms and not any("clip" in name for name in loss.metrics)


def test_the_value_loss_is_clipped_where_value_clip_range_asks():
    """V moved 1 from V_old = R towards a worse error: 0.5 max(1, 0.25^2) = 0.5; where it moved onto R, 0.5 (1 - 0.25)^2."""
    _, batch = mlp_problem(rows=2)
    values = f64([[1.0], [1.0]])
    outputs = PolicyOutputs(logprobs=batch.old_logprobs, values=values)
    given = replace(batch, old_values=f64([[0.0], [0.0]]), returns=f64([[0.0], [1.0]]))
    given = replace(given, denominators={name: w.count.sum() for name, w in batch.weightings.items()})
    loss = TRPO(replace(CONFIG, value_clip_range=0.25)).loss(outputs, given).total
    assert loss.item() == pytest.approx(0.5 * (0.5 + 0.5 * 0.75**2) / 2, abs=1e-12)


def test_an_update_is_one_policy_step_and_then_many_of_the_values(distributed):
    policy, batch = mlp_problem()
    alone = copy.deepcopy(policy)
    values = weights(policy.value_net)
    algorithm = TRPO(replace(CONFIG, entropy_coef=0.01))
    expected = algorithm.full_batch_step(alone, batch, Group())
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    config = UpdateConfig(num_epochs=10, minibatch_size=16, max_grad_norm=10.0)
    metrics = update(policy, algorithm, batch, optimizer, config, distributed, seed=0, step=0)
    assert torch.equal(weights(policy.policy_net), weights(alone.policy_net))
    assert {name: metrics[name] for name in expected} == expected
    assert not torch.equal(weights(policy.value_net), values)
    with torch.no_grad():
        error = (policy(batch.inputs, batch.actions).values - batch.returns).square().mean()
    assert error < 0.2  # it was 1
    assert unknown_names(metrics) == [] and metrics["entropy"] > 0 and metrics["optimizer_steps"] == 30


def check_data_parallelism(algorithm: TRPO) -> None:
    """Two value steps behind DistributedDataParallel: the policy's weights do not move, the values' do."""
    policy, batch = mlp_problem(rows=8)
    acting, judging = weights(policy.policy_net), weights(policy.value_net)
    whole = replace(batch, denominators={name: w.count.sum() for name, w in batch.weightings.items()})
    wrapped = nn.parallel.DistributedDataParallel(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        try:
            algorithm.loss(wrapped(batch.inputs, batch.actions), whole).total.backward()
        except RuntimeError as error:
            raise AssertionError("a parameter of the forward got no gradient") from error
        optimizer.step()
    assert torch.equal(weights(policy.policy_net), acting) and not torch.equal(weights(policy.value_net), judging)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_value_steps_run_behind_data_parallelism(process_group):
    check_data_parallelism(TRPO(CONFIG))


def test_the_check_of_data_parallelism_notices_parameters_without_gradient(process_group, monkeypatch):
    monkeypatch.setattr("rlhf.algorithms.trpo.torch.distributed.is_initialized", lambda: False)
    refute(check_data_parallelism, TRPO(CONFIG))


def test_prepare_hands_the_old_distribution_on_and_whitens_over_the_batch():
    mask = torch.tensor([[True, True, True]])
    off = torch.tensor([[False, False, False]])
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    given = Trajectories(
        inputs={"observations": torch.zeros(1, 3, 2)},
        actions=torch.zeros(1, 3, dtype=torch.int64),
        mask=mask,
        rewards=f64([[1.0, 2.0, 6.0]]),
        sampling_logprobs=zeros,
        old_logprobs=zeros,
        values=zeros,
        next_values=zeros,
        terminated=mask,
        episode_ends=mask | off,
        old_distribution=torch.arange(12.0).reshape(1, 3, 4),
        row_tokens=torch.tensor([3]),
        row_index=torch.tensor([0]),
    )
    algorithm = TRPO(CONFIG)
    batch = algorithm.prepare(given, 0.0, algorithm.initial_state(), local_sum).flatten()
    assert batch.old_distribution.tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    expected = (f64([1.0, 2.0, 6.0]) - 3) / sqrt(14 / 3)
    torch.testing.assert_close(batch.advantages.squeeze(1), expected, rtol=0, atol=1e-7)
    assert algorithm.needs == {"values", "distribution"}


# --- what is refused ---


def test_a_shared_trunk_is_refused_by_the_name_of_what_is_shared():
    policy = Policy(nn.Linear(4, 4), nn.Linear(4, 1), trunk=nn.Linear(3, 4)).double()
    batch = training_batch(
        policy,
        torch.randn(6, 3, dtype=torch.float64),
        torch.zeros(6, 1, dtype=torch.int64),
        torch.randn(6, 1, dtype=torch.float64),
    )
    with pytest.raises(InputError, match=r"separate networks.*trunk\.weight.*2 parameters.*shared_trunk to false"):
        step(policy, batch)


def test_frozen_parameters_stay_and_a_frozen_trunk_may_be_shared():
    torch.manual_seed(0)
    policy = Policy(nn.Linear(4, 4), nn.Linear(4, 1), trunk=nn.Linear(3, 4).requires_grad_(False)).double()
    batch = training_batch(
        policy,
        torch.randn(6, 3, dtype=torch.float64),
        torch.zeros(6, 1, dtype=torch.int64),
        torch.randn(6, 1, dtype=torch.float64),
    )
    frozen = weights(policy.trunk)
    assert step(policy, batch)["line_search_accepted"] == 1
    assert torch.equal(weights(policy.trunk), frozen)
    policy.policy_net.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        step(policy, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_advantages": "minibatch"}, "normalize_advantages"),
        ({"baseline": "none", "gae_lambda": 1.0}, "baseline"),
        ({"penalty_coef": 1.0}, "penalty_coef"),
    ],
)
def test_settings_of_ppo_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TRPO(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_kl", 0.0),
        ("max_kl", inf),
        ("max_kl", nan),
        ("damping", -0.1),
        ("damping", nan),
        ("cg_iterations", 0),
        ("backtracks", -1),
        ("backtrack_decay", 1.0),
        ("backtrack_decay", 0.0),
        ("fisher_subsample", 0),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name} must be"):
        TrustRegionConfig(**{name: value})


@pytest.mark.parametrize(
    ("field", "name"), [("advantages", "surrogate"), ("old_logprobs", "surrogate"), ("old_distribution", "KL")]
)
def test_numbers_that_are_not_finite_stop_the_run_and_change_nothing(field, name):
    policy, batch = mlp_problem()
    before = weights(policy)
    damaged = getattr(batch, field).clone()
    damaged[3] = nan
    with pytest.raises(TrainingError, match=f"{name}.*not finite; nothing was applied"):
        step(policy, replace(batch, **{field: damaged}))
    assert torch.equal(weights(policy), before)


def test_a_curvature_that_is_not_finite_stops_the_run_and_changes_nothing():
    """|x|^1.5 has the derivative 0 at 0, but no second one."""
    policy, batch = mlp_problem()
    before = weights(policy)
    policy.divergence = lambda p, q: kl(p, q) + ((q - p).abs() ** 1.5).sum(-1)
    with pytest.raises(TrainingError, match=r"natural gradient.*not finite; nothing was applied"):
        step(policy, batch)
    assert torch.equal(weights(policy), before)


def test_a_policy_that_is_not_the_one_of_the_batch_is_noticed():
    """Dropout, or statistics that were updated in between: KL(old || policy) is not 0 before the step."""
    policy, batch = mlp_problem()
    policy.policy_net[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.2))
    before = weights(policy)
    with pytest.raises(TrainingError, match=r"before TRPO's step, where it must be 0.*dropout"):
        step(policy, batch)
    assert torch.equal(weights(policy), before)
    policy.eval()
    assert step(policy, batch)["line_search_accepted"] == 1


def test_what_the_collector_or_the_policy_leaves_out_is_named():
    policy, batch = mlp_problem()
    with pytest.raises(InputError, match="old_distribution"):
        step(policy, replace(batch, old_distribution=None))
    policy.divergence = lambda p, q: None
    with pytest.raises(InputError, match=r"exact KL.*PolicyOutputs\.kl"):
        step(policy, batch)


def test_single_precision_steps_within_the_bound():
    policy, batch = mlp_problem(rows=500)

    def single(tensor):
        return tensor.float() if tensor.is_floating_point() else tensor

    policy, batch = policy.float(), batch.map_rows(single)
    metrics = step(policy, batch)
    assert metrics["line_search_accepted"] == 1 and 0.005 < metrics["trust_region_kl"] <= 0.01
