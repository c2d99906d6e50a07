"""Trust regions, exactly: on a softmax bandit everything about a natural gradient step is known in closed form."""

from math import inf, nan, sqrt

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from rlhf.core.trust_region import (
    LineSearch,
    assign,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    line_search,
    step_size,
)
from tests.controls import names, refute, run_ranks

EXACT = {"rtol": 0, "atol": 1e-12}
CLOSE = {"rtol": 0, "atol": 1e-10}


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOGITS = f64([0.3, -1.2, 0.8, 0.1, -0.4])
REWARDS = f64([1.0, -0.5, 0.25, 2.0, -1.5])
P = LOGITS.softmax(0)
EYE = torch.eye(5, dtype=torch.float64)
FISHER = P.diag() - P.outer(P)
GRADIENT = FISHER @ REWARDS
"""Of sum_a p(a) R(a) = of the expected ratio times R: p (R - mean_p R)."""


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of two vectors of logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# --- flat vectors ---


def test_parameters_become_one_vector_and_back_in_their_own_storage():
    first, second = nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.tensor([7.0]))
    assert flatten([first.t(), second]).tolist() == [0, 3, 1, 4, 2, 5, 7]
    places = first.data_ptr(), second.data_ptr()
    assign([first, second], torch.arange(10.0, 17.0))
    assert first.tolist() == [[10, 11, 12], [13, 14, 15]] and second.tolist() == [16]
    assert (first.data_ptr(), second.data_ptr()) == places and first.requires_grad


# --- Fisher-vector product ---


def check_product_on_the_bandit(fisher_vector_product) -> None:
    """Columns of diag(p) - p p^T + damping I, from products with the unit vectors."""
    theta = LOGITS.clone().requires_grad_()
    for damping in (0.0, 0.3):
        product = fisher_vector_product(lambda: kl(LOGITS, theta), [theta], damping=damping)
        columns = torch.stack([product(unit) for unit in EYE])
        torch.testing.assert_close(columns, FISHER + damping * EYE, **EXACT)
    assert theta.grad is None


def test_the_product_is_the_fisher_matrix_of_a_softmax_plus_damping():
    check_product_on_the_bandit(fisher_vector_product)


def product_without_damping(mean_kl, parameters, *, damping, **kw):
    return fisher_vector_product(mean_kl, parameters, damping=0.0, **kw)


def product_of_the_first_derivative_squared(mean_kl, parameters, *, damping, all_sum=None):
    """g g^T with g the gradient of the KL, which is 0 where the KL is."""
    gradient = flatten(torch.autograd.grad(mean_kl(), parameters))
    return lambda vector: gradient * (gradient @ vector) + damping * vector


def product_of_twice_the_kl(mean_kl, parameters, **kw):
    return fisher_vector_product(lambda: 2 * mean_kl(), parameters, **kw)


PRODUCTS = [product_without_damping, product_of_the_first_derivative_squared, product_of_twice_the_kl]


@pytest.mark.parametrize("variant", PRODUCTS, ids=names(PRODUCTS))
def test_the_check_of_the_product_notices(variant):
    refute(check_product_on_the_bandit, variant)


def test_the_kl_and_its_gradient_are_zero_at_the_old_parameters():
    theta = LOGITS.clone().requires_grad_()
    value = kl(LOGITS, theta)
    (gradient,) = torch.autograd.grad(value, theta)
    assert value == 0 and gradient.abs().max().item() == pytest.approx(0, abs=1e-14)


def mlp(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_the_product_of_a_network_is_its_jacobian_around_the_fisher_matrix_of_its_outputs(kind):
    """mean over states of J^T M J: M = diag(p) - p p^T for logits; diag(1 / std^2, 2) for means and log-stds."""
    network = mlp(4)
    states = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    named = dict(network.named_parameters())
    jacobians = jacrev(lambda parameters: functional_call(network, parameters, (states,)))(
        {name: parameter.detach() for name, parameter in named.items()}
    )
    jacobian = torch.cat([jacobians[name].flatten(2) for name in named], -1)  # (states, outputs, parameters)
    old = network(states).detach()
    if kind == "categorical":
        p = old.softmax(-1)
        middle = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)

        def mean_kl() -> torch.Tensor:
            return kl(old, network(states)).mean()
    else:
        precision = (-2 * old[:, 2:]).exp()
        middle = torch.cat([precision, torch.full_like(precision, 2.0)], -1).diag_embed()

        def mean_kl() -> torch.Tensor:
            mean, log_std = network(states).split(2, -1)
            old_mean, old_log_std = old.split(2, -1)
            squares = ((old_mean - mean) ** 2 + (2 * old_log_std).exp()) * (-2 * log_std).exp()
            return (log_std - old_log_std + 0.5 * squares - 0.5).sum(-1).mean()

    explicit = torch.einsum("sip,sij,sjq->pq", jacobian, middle, jacobian) / len(states)
    product = fisher_vector_product(mean_kl, list(named.values()), damping=0.1)
    vectors = torch.randn(5, len(explicit), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for vector in vectors:
        torch.testing.assert_close(product(vector), explicit @ vector + 0.1 * vector, **CLOSE)


def check_split_over_processes(fisher_vector_product) -> None:
    """Two processes with 3 and 4 of 7 states give the product of all, on both; the damping counts once."""
    theta = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    vector = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def product(rows, **kw):
        shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        share = theta[rows]
        return fisher_vector_product(lambda: kl(share, share + shift).sum() / 7, [shift], damping=0.5, **kw)(vector)

    whole = product(slice(None))
    shares = run_ranks(lambda rank, all_sum: product(slice(rank, None, 2), all_sum=all_sum), 2)
    for share in shares:
        torch.testing.assert_close(share, whole, **EXACT)


def test_processes_add_their_shares_of_the_product_and_the_damping_once():
    check_split_over_processes(fisher_vector_product)


def product_damped_on_every_process(mean_kl, parameters, *, damping, all_sum=lambda x: x):
    product = fisher_vector_product(mean_kl, parameters, damping=damping)
    return lambda vector: all_sum(product(vector))


def product_of_the_own_share(mean_kl, parameters, *, damping, all_sum=None):
    return fisher_vector_product(mean_kl, parameters, damping=damping)


SHARED = [product_damped_on_every_process, product_of_the_own_share]


@pytest.mark.parametrize("variant", SHARED, ids=names(SHARED))
def test_the_check_of_several_processes_notices(variant):
    refute(check_split_over_processes, variant)


# --- conjugate gradient ---


def check_least_norm_solution(conjugate_gradient) -> None:
    """F is singular along (1, ..., 1). F s = g = F R has the least-norm solution R - mean of R over actions."""
    solution = conjugate_gradient(lambda v: FISHER @ v, GRADIENT, iterations=10)
    torch.testing.assert_close(solution, REWARDS - REWARDS.mean(), **CLOSE)
    variance = (P * (REWARDS - P @ REWARDS) ** 2).sum()
    torch.testing.assert_close(solution @ FISHER @ solution, variance, **CLOSE)


def check_linear_solve(conjugate_gradient) -> None:
    """With damping: the solution of (F + cI) s = g, whatever the scale of g."""
    damped = FISHER + 0.1 * EYE
    for scale in (1.0, 1e-8):
        solution = conjugate_gradient(lambda v: damped @ v, scale * GRADIENT, iterations=10, tolerance=1e-26)
        torch.testing.assert_close(solution / scale, torch.linalg.solve(damped, GRADIENT), **CLOSE)
        default = conjugate_gradient(lambda v: damped @ v, scale * GRADIENT, iterations=10)
        assert (damped @ default / scale - GRADIENT).norm() <= 1e-5 * GRADIENT.norm()


def test_conjugate_gradient_finds_the_solution_of_least_norm():
    check_least_norm_solution(conjugate_gradient)


def test_conjugate_gradient_agrees_with_a_linear_solve_at_any_scale():
    check_linear_solve(conjugate_gradient)


def cg_starts_at_b(product, b, **kw):
    return b + conjugate_gradient(product, b - product(b), **kw)


def cg_starts_off_the_range(product, b, **kw):
    """Solves F s = g, too, but with a part along (1, ..., 1), where F is 0."""
    start = torch.ones_like(b)
    return start + conjugate_gradient(product, b - product(start), **kw)


def cg_forgets_conjugacy(product, b, *, iterations, tolerance=1e-10):
    """Steepest descent."""
    x = torch.zeros_like(b)
    for _ in range(iterations):
        residual = b - product(x)
        x = x + (residual @ residual) / (residual @ product(residual)) * residual
    return x


def cg_stops_at_an_absolute_residual(product, b, *, iterations, tolerance=1e-10):
    return conjugate_gradient(product, b, iterations=iterations, tolerance=tolerance / (b @ b).item())


@pytest.mark.parametrize("variant", [cg_starts_off_the_range, cg_forgets_conjugacy], ids=lambda v: v.__name__)
def test_the_check_of_the_least_norm_notices(variant):
    refute(check_least_norm_solution, variant)


def test_starting_elsewhere_within_the_range_changes_nothing():
    """What is refuted above is leaving the range, not the start as such: g lies in it."""
    check_least_norm_solution(cg_starts_at_b)


@pytest.mark.parametrize("variant", [cg_forgets_conjugacy, cg_stops_at_an_absolute_residual], ids=lambda v: v.__name__)
def test_the_check_of_the_linear_solve_notices(variant):
    refute(check_linear_solve, variant)


def test_conjugate_gradient_uses_at_most_the_given_number_of_products_and_stops_early_when_done():
    eigenvalues = torch.linspace(1, 1000, 40, dtype=torch.float64)
    calls = []

    def product(vector):
        calls.append(1)
        return eigenvalues * vector

    conjugate_gradient(product, torch.ones(40, dtype=torch.float64), iterations=7)
    assert len(calls) == 7
    calls.clear()
    eigenvalues = torch.full_like(eigenvalues, 4.0)
    solution = conjugate_gradient(product, torch.ones(40, dtype=torch.float64), iterations=7)
    assert len(calls) == 1 and torch.equal(solution, 1 / eigenvalues)


def test_no_gradient_and_no_curvature_give_no_step_instead_of_nan():
    zero = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(conjugate_gradient(lambda v: FISHER @ v, zero, iterations=10), zero)
    assert step_size(zero, zero, max_kl=0.01) == 0
    assert torch.equal(conjugate_gradient(lambda v: -v, GRADIENT, iterations=10), zero)  # rounding can turn the sign
    assert step_size(GRADIENT, -GRADIENT, max_kl=0.01) == 0


# --- step size ---


@pytest.mark.parametrize("max_kl", [1e-2, 1e-4, 1e-6])
def test_an_undamped_step_tilts_the_policy_exponentially_and_reaches_the_kl(max_kl):
    """p exp(eta R) / Z with eta = sqrt(2 delta / Var_p R); KL / delta - 1 -> sqrt(2 delta) skewness_p(R) / 3 -> 0."""
    direction = conjugate_gradient(lambda v: FISHER @ v, GRADIENT, iterations=10)
    new = LOGITS + step_size(direction, FISHER @ direction, max_kl=max_kl) * direction
    centred = REWARDS - P @ REWARDS
    variance = P @ centred**2
    eta = (2 * max_kl / variance).sqrt()
    tilted = P * (eta * REWARDS).exp()
    torch.testing.assert_close(new.softmax(0), tilted / tilted.sum(), **CLOSE)
    reached = (kl(LOGITS, new) / max_kl - 1).item()
    skewness = (P @ centred**3 / variance**1.5).item()
    assert reached == pytest.approx(sqrt(2 * max_kl) * skewness / 3, abs=max_kl)


# --- line search ---


def search(line_search, logits, step, *, objective=None, divergence=kl, max_kl=0.01, decay=0.5, max_backtracks=10):
    """(what was found, the logits after it) on the bandit, whose objective is the expected reward."""
    theta = nn.Parameter(logits.clone())

    @torch.no_grad()
    def evaluate():
        return (theta.softmax(0) @ REWARDS).item(), divergence(logits, theta).item()

    before = evaluate()[0] if objective is None else objective
    limits = {"max_kl": max_kl, "decay": decay, "max_backtracks": max_backtracks}
    found = line_search([theta], step, evaluate, objective=before, **limits)
    return found, theta.detach()


def check_first_that_keeps_both_promises(line_search) -> None:
    """Of the steps s, s/2, s/4, ... the first with KL <= max_kl and a better objective, found by trying them all here.

    Along 4 R the KL decides. Along `overshoots` the objective does: the best action gains at first, the worst in the end.
    """
    rare, overshoots = f64([0, 0, 0, 0, -20]), f64([0, 0, 0, 10, 40])
    cases = [(LOGITS, 4 * REWARDS, 0.01), (rare, overshoots, inf), (LOGITS, 1e-3 * REWARDS, 0.01)]
    firsts = []
    for logits, step, max_kl in cases:
        before = (logits.softmax(0) @ REWARDS).item()
        candidates = [logits + 0.5**j * step for j in range(11)]
        gains = [(new.softmax(0) @ REWARDS).item() - before for new in candidates]
        first = next(j for j in range(11) if kl(logits, candidates[j]) <= max_kl and gains[j] > 0)
        found, after = search(line_search, logits, step, max_kl=max_kl)
        assert found.accepted and found.backtracks == first
        torch.testing.assert_close(after, candidates[first], **EXACT)
        assert found.kl == pytest.approx(kl(logits, after).item(), abs=1e-12) and found.kl <= max_kl
        assert found.gain == pytest.approx(gains[first], abs=1e-12) and found.gain > 0
        firsts.append(first)
    assert firsts[0] > 1 and firsts[1] == 1 and firsts[2] == 0


def test_the_first_candidate_that_keeps_both_promises_is_accepted():
    check_first_that_keeps_both_promises(line_search)


def check_limits_themselves(line_search) -> None:
    """A KL of exactly max_kl is within the bound, the next number is not; the last of the backtracks still counts."""
    for divergence, backtracks in [(0.01, 0), (torch.nextafter(f64(0.01), f64(1.0)).item(), None)]:
        found, _ = search(line_search, LOGITS, 1e-3 * REWARDS, divergence=lambda p, q, value=divergence: f64(value))
        assert (found.backtracks if found.accepted else None) == backtracks
    needed, _ = search(line_search, LOGITS, 4 * REWARDS)
    for limit in (needed.backtracks, needed.backtracks - 1):
        found, _ = search(line_search, LOGITS, 4 * REWARDS, max_backtracks=limit)
        assert found.accepted == (limit == needed.backtracks) and found.backtracks == limit


def test_the_limits_themselves_are_allowed():
    check_limits_themselves(line_search)


def search_stops_one_short(parameters, step, evaluate, *, max_backtracks, **kw):
    return line_search(parameters, step, evaluate, max_backtracks=max_backtracks - 1, **kw)


def search_allows_a_little_more(parameters, step, evaluate, *, max_kl, **kw):
    return line_search(parameters, step, evaluate, max_kl=max_kl * (1 + 1e-6), **kw)


LIMITS = [search_stops_one_short, search_allows_a_little_more]


@pytest.mark.parametrize("variant", LIMITS, ids=names(LIMITS))
def test_the_check_of_the_limits_notices(variant):
    refute(check_limits_themselves, variant)


def check_restores(line_search) -> None:
    """No candidate is good: downhill, or too few backtracks, or a number that is not finite. Every bit is as before."""
    logits = f64([0.1, -0.0, 1e-300, 1e16, 3.3])
    uphill, downhill = REWARDS.clone(), -REWARDS * 1e-3
    cases = [
        (LOGITS, downhill, {}),
        (logits, downhill * 1e-20, {}),  # too small to change anything: no gain
        (LOGITS, 30 * uphill, {"max_backtracks": 2}),
        (LOGITS, uphill * nan, {}),
        (LOGITS, uphill * inf, {}),
        (LOGITS, uphill, {"divergence": lambda p, q: f64(nan)}),
        (LOGITS, uphill, {"divergence": lambda p, q: f64(-inf)}),
        (LOGITS, uphill, {"objective": nan, "max_kl": inf}),
        (LOGITS, uphill, {"objective": -inf, "max_kl": inf}),
    ]
    for before, step, options in cases:
        found, after = search(line_search, before, step, **options)
        assert found == LineSearch(False, options.get("max_backtracks", 10), 0.0, 0.0)
        assert torch.equal(after.view(torch.int64), before.view(torch.int64))


def test_the_old_parameters_come_back_bit_for_bit_when_no_candidate_is_good():
    check_restores(line_search)


def test_the_old_parameters_come_back_when_the_evaluation_fails():
    theta = nn.Parameter(LOGITS.clone())

    def evaluate():
        raise RuntimeError("out of memory")

    limits = {"objective": 0.0, "max_kl": 0.01, "decay": 0.5, "max_backtracks": 3}
    with pytest.raises(RuntimeError, match="out of memory"):
        line_search([theta], REWARDS, evaluate, **limits)
    assert torch.equal(theta, LOGITS)


def loosened(accepts):
    """The real line search with another test of a candidate: accepts(gain, kl, max_kl)."""

    def variant(parameters, step, evaluate, *, objective, max_kl, decay, max_backtracks):
        old = flatten(parameters).detach()
        for backtracks in range(max_backtracks + 1):
            assign(parameters, old + decay**backtracks * step)
            value, kl = evaluate()
            if accepts(value - objective, kl, max_kl):
                return LineSearch(True, backtracks, kl, value - objective)
        assign(parameters, old)
        return LineSearch(False, max_backtracks, 0.0, 0.0)

    return variant


def search_keeps_the_last_candidate(parameters, step, evaluate, **kw):
    moved = []

    def remember():
        moved.append(flatten(parameters).detach())
        return evaluate()

    found = line_search(parameters, step, remember, **kw)
    assign(parameters, moved[-1])
    return found


def search_subtracts_the_step_again(parameters, step, evaluate, *, decay, max_backtracks, **kw):
    found = search_keeps_the_last_candidate(
        parameters, step, evaluate, decay=decay, max_backtracks=max_backtracks, **kw
    )
    if not found.accepted:
        assign(parameters, flatten(parameters).detach() - decay**max_backtracks * step)
    return found


def search_takes_nan_for_good(*args, **kw):
    return loosened(lambda gain, kl, max_kl: not (kl > max_kl or gain <= 0))(*args, **kw)


def search_ignores_the_objective(*args, **kw):
    return loosened(lambda gain, kl, max_kl: kl <= max_kl)(*args, **kw)


def search_ignores_the_kl(*args, **kw):
    return loosened(lambda gain, kl, max_kl: gain > 0)(*args, **kw)


def search_allows_half_as_much_again(*args, **kw):
    return loosened(lambda gain, kl, max_kl: kl <= 1.5 * max_kl and gain > 0)(*args, **kw)


def search_shortens_before_the_first_try(parameters, step, evaluate, *, decay, **kw):
    return line_search(parameters, decay * step, evaluate, decay=decay, **kw)


RESTORES = [
    search_keeps_the_last_candidate,
    search_subtracts_the_step_again,
    search_takes_nan_for_good,
    search_ignores_the_objective,
    search_ignores_the_kl,
]
FIRSTS = [search_ignores_the_objective, search_ignores_the_kl, search_shortens_before_the_first_try]


@pytest.mark.parametrize("variant", RESTORES, ids=names(RESTORES))
def test_the_check_of_restoring_notices(variant):
    refute(check_restores, variant)


@pytest.mark.parametrize("variant", FIRSTS, ids=names(FIRSTS))
def test_the_check_of_the_first_good_candidate_notices(variant):
    refute(check_first_that_keeps_both_promises, variant)


def check_random_searches(line_search) -> None:
    """Whatever the step: the objective rises and the KL keeps to its bound, or nothing has changed."""
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(60):
        logits, noise = torch.randn(2, 5, dtype=torch.float64, generator=generator)
        step = (noise + REWARDS) * (3 * torch.randn((), dtype=torch.float64, generator=generator)).exp()
        found, after = search(line_search, logits, step, max_kl=0.02, decay=0.8)
        gain = ((after.softmax(0) - logits.softmax(0)) @ REWARDS).item()
        if found.accepted:
            assert gain > 0 and kl(logits, after) <= 0.02
        else:
            assert torch.equal(after, logits)
        accepted += found.accepted
    assert 15 < accepted < 60  # both outcomes occur


def test_on_random_problems_the_objective_rises_within_the_kl_or_nothing_changes():
    check_random_searches(line_search)


RANDOM = [
    search_keeps_the_last_candidate,
    search_ignores_the_objective,
    search_ignores_the_kl,
    search_allows_half_as_much_again,
]


@pytest.mark.parametrize("variant", RANDOM, ids=names(RANDOM))
def test_the_check_of_random_problems_notices(variant):
    refute(check_random_searches, variant)


def check_direction_of_the_kl(divergence) -> None:
    """A step onto one action a: KL(new || old) never exceeds -log p(a), here below the bound, so it would take the whole
    step; KL(old || new) grows without end, because the new policy gives up what the old one did."""
    step, max_kl = f64([-6.0, -6.0, -6.0, 3.0, -6.0]), 1.7
    assert kl(LOGITS + step, LOGITS) < -P[3].log() < max_kl
    first = next(j for j in range(11) if kl(LOGITS, LOGITS + 0.5**j * step) <= max_kl)
    found, _ = search(line_search, LOGITS, step, divergence=divergence, max_kl=max_kl)
    assert found.backtracks == first > 0


def test_the_line_search_bounds_the_kl_from_old_to_new():
    check_direction_of_the_kl(kl)


def test_the_check_of_the_direction_notices_the_other_one():
    refute(check_direction_of_the_kl, lambda p, q: kl(q, p))


def test_both_directions_have_the_same_hessian_so_only_the_line_search_can_tell():
    theta = LOGITS.clone().requires_grad_()
    vector = f64([1.0, 2.0, -1.0, 0.5, 0.0])
    products = [
        fisher_vector_product(mean_kl, [theta], damping=0.0)(vector)
        for mean_kl in (lambda: kl(LOGITS, theta), lambda: kl(theta, LOGITS))
    ]
    torch.testing.assert_close(*products, **EXACT)
