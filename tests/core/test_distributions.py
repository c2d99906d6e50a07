"""Distributions of actions against torch.distributions, enumeration and numerical integration."""

from itertools import product
from math import log, pi, prod

import pytest
import torch
from torch import distributions as td
from torch.nn.functional import softplus

from rlhf.core.distributions import MASKED_LOGIT, Categorical, Gaussian, MultiCategorical, SquashedGaussian
from rlhf.core.logprobs import token_logprobs
from tests.controls import refute
from tests.rounding import EPS

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SCALE, SHIFT = (0.5, 2.0, 3.0), (1.0, 0.0, -2.0)
FAMILIES = [Categorical(4), MultiCategorical((3, 2, 4)), Gaussian(3), SquashedGaussian(3, scale=SCALE, shift=SHIFT)]


def family_name(family):
    return type(family).__name__


each_family = pytest.mark.parametrize("family", FAMILIES, ids=family_name)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def some(family, rows=50, seed=0):
    """(params, others, actions) in float64."""
    params, others = normal(rows, family.num_params, seed=seed), normal(rows, family.num_params, seed=seed + 1)
    draws = torch.rand(rows, family.num_draws, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return params, others, family.sample(params, draws)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or EXACT))


# --- known distributions ---


def test_categorical_agrees_with_torch():
    family = Categorical(4)
    params, others, actions = some(family)
    ours, other = td.Categorical(logits=params), td.Categorical(logits=others)
    close(family.logprobs(params, actions), ours.log_prob(actions))
    close(family.entropy(params), ours.entropy())
    close(family.kl(params, others), td.kl_divergence(ours, other))
    close(family.logprobs(params, actions), token_logprobs(params, actions))  # an action is scored like a token


def test_gaussian_agrees_with_torch():
    family = Gaussian(3)
    params, others, actions = some(family)
    ours, other = (td.Normal(p[:, :3], p[:, 3:].exp()) for p in (params, others))
    close(family.logprobs(params, actions), ours.log_prob(actions).sum(-1))
    close(family.entropy(params), ours.entropy().sum(-1))
    close(family.kl(params, others), td.kl_divergence(ours, other).sum(-1))


def test_the_kl_is_that_of_the_first_to_the_second():
    """The other direction, a common mistake, is another number."""
    for family in FAMILIES[:3]:
        params, others, _ = some(family)
        numbers = family.kl(params, others), family.kl(others, params)
        assert (numbers[0] - numbers[1]).abs().min() > 1e-4
        close(family.kl(params, params), torch.zeros(50, dtype=F64))
        assert (numbers[0] > 0).all()


@pytest.mark.parametrize("sizes", [(3, 2, 4), (2, 2, 2), (5,), (1, 3)], ids=str)
def test_multi_categorical_is_the_product_of_its_parts(sizes):
    """By enumeration of every combination: log-probs, entropy and KL of the joint distribution."""
    family = MultiCategorical(sizes)
    params, others = normal(6, sum(sizes)), normal(6, sum(sizes), seed=1)
    combinations = list(product(*map(range, sizes)))
    joint, other = (
        torch.stack([_product_of_softmaxes(p, sizes, choice) for choice in combinations], -1) for p in (params, others)
    )
    assert joint.shape == (6, prod(sizes))
    actions = torch.tensor(combinations)
    for row in range(6):
        repeated = params[row].expand(len(combinations), -1)
        close(family.logprobs(repeated, actions), joint[row].log())
    close(family.entropy(params), -(joint * joint.log()).sum(-1))
    close(family.kl(params, others), (joint * (joint / other).log()).sum(-1))
    best = joint.argmax(-1)
    assert family.mode(params).tolist() == [list(combinations[i]) for i in best]


def _product_of_softmaxes(params, sizes, choice):
    parts = params.exp().split(sizes, -1)
    return prod(part[:, c] / part.sum(-1) for part, c in zip(parts, choice, strict=True))


# --- choices that are forbidden ---


def test_a_masked_choice_has_probability_zero_and_takes_part_in_nothing():
    """Among the allowed ones everything is as if the others did not exist; gradients are finite, 0 for the forbidden."""
    allowed = torch.tensor([True, False, True, True, False])
    logits, others = normal(6, 5).requires_grad_(), normal(6, 5, seed=1)
    masked, other = (p.masked_fill(~allowed, MASKED_LOGIT) for p in (logits, others))
    family, narrow = Categorical(5), Categorical(3)
    few, few_others = logits[:, allowed], others[:, allowed]
    close(family.entropy(masked), narrow.entropy(few))
    close(family.kl(masked, other), narrow.kl(few, few_others))
    close(family.logprobs(masked, torch.full((6,), 2)), narrow.logprobs(few, torch.full((6,), 1)))
    assert (family.logprobs(masked, torch.full((6,), 1)).exp() == 0).all()
    (
        family.entropy(masked) + family.kl(masked, other) + family.logprobs(masked, torch.zeros(6).long())
    ).sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, ~allowed] == 0).all() and logits.grad[:, allowed].any()


@pytest.mark.parametrize("forbidden", [MASKED_LOGIT, float("-inf")])
def test_the_kl_of_masked_distributions_is_finite_with_other_masks_too(forbidden):
    """Also where the second forbids what the first may do, which costs a lot but is no NaN."""
    p = torch.tensor([[0.3, forbidden, 0.1, forbidden]])
    q = torch.tensor([[0.0, forbidden, forbidden, 1.0]])
    kl = Categorical(4).kl(p, q)
    assert kl.isfinite().all() and kl.item() > 1e8
    assert Categorical(4).kl(p, p).item() == 0


def test_a_part_that_allows_nothing_never_chooses_what_does_not_exist():
    """Shorter parts are padded inside; with all real choices forbidden, they share the probability alone."""
    family = MultiCategorical((2, 4))
    params = torch.full((101, 6), MASKED_LOGIT)
    draws = torch.linspace(0, 1 - 2**-53, 101, dtype=F64)[:, None].expand(-1, 2)
    actions = family.sample(params, draws)
    assert set(actions[:, 0].tolist()) == {0, 1} and set(actions[:, 1].tolist()) == {0, 1, 2, 3}
    close(family.logprobs(params, actions), torch.full((101,), -log(8)), rtol=0, atol=1e-6)


# --- the squashed Gaussian ---


def test_squashed_gaussian_agrees_with_torch_on_the_actions_it_makes():
    """torch's transforms remember u, so nothing is lost near the bounds."""
    family = FAMILIES[3]
    params, _, u = some(family)
    base = td.Normal(params[:, :3], params[:, 3:].exp())
    scale, shift = torch.tensor(SCALE, dtype=F64), torch.tensor(SHIFT, dtype=F64)
    transforms = [td.TanhTransform(cache_size=1), td.AffineTransform(shift, scale, cache_size=1)]
    peer = td.TransformedDistribution(base, transforms)
    a = u
    for transform in transforms:
        a = transform(a)
    close(family.logprobs(params, u), peer.log_prob(a).sum(-1))


class NoJacobian(SquashedGaussian):
    def logprobs(self, params, actions):
        return Gaussian.logprobs(self, params, actions)

    def entropy(self, params):
        return Gaussian.entropy(self, params)


class NoScale(SquashedGaussian):
    def logprobs(self, params, actions):
        return super().logprobs(params, actions) + sum(log(scale) for scale in self.scale)

    def entropy(self, params):
        return super().entropy(params) - sum(log(scale) for scale in self.scale)


class NaiveLogDeterminant(SquashedGaussian):
    """log(1 - tanh(u)^2 + 1e-6), as tutorials have it."""

    def logprobs(self, params, actions):
        slope = torch.log(1 - actions.tanh() ** 2 + 1e-6).sum(-1)
        return Gaussian.logprobs(self, params, actions) - slope - sum(log(scale) for scale in self.scale)


BROKEN = [NoJacobian, NoScale, NaiveLogDeterminant]


def integral(values, points):
    return torch.trapezoid(values, points)


def wide_grid(mean, std):
    return torch.linspace(mean - 12 * std, mean + 12 * std, 40_001, dtype=F64)


def test_the_squashed_density_integrates_to_one():
    """Over a = 3 tanh(u) - 2, with da = 3 / cosh(u)^2 du."""

    def check(kind):
        family = kind(1, scale=(3.0,), shift=(-2.0,))
        for mean, std in ((0.0, 1.0), (-1.5, 0.3), (0.7, 2.0)):
            u = wide_grid(mean, std)
            params = torch.tensor([mean, log(std)], dtype=F64).expand(len(u), 2)
            logprobs = family.logprobs(params, u[:, None])
            slope = 3.0 * 4 * (-2 * u.abs()).exp() / (1 + (-2 * u.abs()).exp()) ** 2  # 1 / cosh^2 without overflow
            assert integral(logprobs.exp() * slope, u).item() == pytest.approx(1, abs=1e-9)

    check(SquashedGaussian)
    for kind in BROKEN:
        refute(check, kind)


@pytest.mark.parametrize("u", [20.0, -20.0])
def test_the_log_determinant_is_right_far_out_where_the_naive_one_saturates(u):
    """At |u| = 20: 2 (log 2 - 20) = -38.614, and its slope is -2 tanh(u)."""

    def check(kind):
        action = torch.tensor([[u]], dtype=F64, requires_grad=True)
        params = torch.tensor([[u, 0.0]], dtype=F64)  # its own mean: the Gaussian's log-prob is flat there
        log_determinant = -0.5 * log(2 * pi) - kind(1, scale=(1.0,), shift=(0.0,)).logprobs(params, action)
        log_determinant.sum().backward()
        assert log_determinant.item() == pytest.approx(2 * (log(2) - 20), abs=1e-12)
        assert action.grad.item() == pytest.approx(-2.0 * (1 if u > 0 else -1), abs=1e-12)

    check(SquashedGaussian)
    refute(check, NaiveLogDeterminant)
    refute(check, NoJacobian)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_log_determinant_is_finite_and_smooth_everywhere(dtype):
    """Against log(1 / cosh(u)^2) from exponentials that cannot overflow; torch's softplus is off by 2e-9 beyond 10."""
    u = torch.cat([torch.linspace(-30, 30, 1201, dtype=dtype), torch.tensor([-1e4, 1e4], dtype=dtype)]).requires_grad_()
    params = torch.stack([u.detach(), torch.zeros_like(u)], -1)

    rounding = {torch.float32: 32 * EPS, F64: 1e-13}[dtype]

    def check(family):
        found = -0.5 * log(2 * pi) - family.logprobs(params, u[:, None])
        truth = (2 * log(2) - 2 * u.abs().double() - 2 * torch.log1p((-2 * u.abs().double()).exp())).to(dtype)
        close(found, truth, rtol=rounding, atol=rounding)
        return found

    (slope,) = torch.autograd.grad(check(SquashedGaussian(1, scale=(1.0,), shift=(0.0,))).sum(), u)
    close(slope, -2 * u.detach().tanh(), rtol=0, atol=128 * EPS if dtype == torch.float32 else 1e-12)

    class WithTorchsThreshold(SquashedGaussian):
        def logprobs(self, params, actions):
            slope = 2 * (log(2) - actions - softplus(-2 * actions))
            return Gaussian.logprobs(self, params, actions) - slope.sum(-1)

    if dtype == F64:
        refute(check, WithTorchsThreshold(1, scale=(1.0,), shift=(0.0,)))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.8, 0.05), (-3.0, 0.7), (0.3, 2.0), (0.0, 4.0)])
def test_squashed_entropy_is_the_integral_of_its_density(mean, std):
    """H = -integral p log p, by 40 000 trapezoids; and its gradient with them."""
    params = torch.tensor([mean, log(std)], dtype=F64, requires_grad=True)
    tolerance = 1e-11 if std <= 1 else 1e-6 if std <= 2 else 1e-3  # of the 32 nodes of the quadrature, not of rounding
    u = wide_grid(mean, std)
    density = td.Normal(params[0], params[1].exp()).log_prob(u)
    slope = 2 * log(2) - 2 * u.abs() - 2 * torch.log1p((-2 * u.abs()).exp()) + log(3.0)
    exact = -integral(density.exp() * (density - slope), u)
    (exact_gradient,) = torch.autograd.grad(exact, params)

    def check(kind):
        found = kind(1, scale=(3.0,), shift=(-2.0,)).entropy(params)
        (gradient,) = torch.autograd.grad(found, params)
        close(found, exact, rtol=0, atol=tolerance)
        close(gradient, exact_gradient, rtol=0, atol=100 * tolerance)

    check(SquashedGaussian)
    refute(check, NoJacobian)
    refute(check, NoScale)


def test_squashed_entropy_adds_up_over_dimensions():
    family = FAMILIES[3]
    params, _, _ = some(family)
    apart = [SquashedGaussian(1, scale=(SCALE[d],), shift=(SHIFT[d],)).entropy(params[:, [d, d + 3]]) for d in range(3)]
    close(family.entropy(params), sum(apart))


def test_squashing_keeps_the_kl():
    """The integral of p log(p / q) over the squashed actions, in which the Jacobian cancels."""
    family = SquashedGaussian(1, scale=(3.0,), shift=(-2.0,))
    p, q = torch.tensor([0.4, log(0.8)], dtype=F64), torch.tensor([-0.3, log(1.3)], dtype=F64)
    u = wide_grid(0.4, 0.8)
    logp, logq = (family.logprobs(x.expand(len(u), 2), u[:, None]) for x in (p, q))
    slope = 3.0 / u.cosh() ** 2
    close(family.kl(p, q), integral(logp.exp() * slope * (logp - logq), u), rtol=0, atol=1e-9)


def test_bounds_of_another_number_than_the_dimensions_are_refused():
    with pytest.raises(ValueError, match="must have 2 numbers"):
        SquashedGaussian(2, scale=(1.0,), shift=(0.0, 0.0))
    with pytest.raises(ValueError, match="above 0"):
        SquashedGaussian(1, scale=(0.0,), shift=(0.0,))


# --- sampling ---


def test_categorical_samples_have_its_probabilities():
    """Over a regular grid of n draws each choice comes n p times, to within one."""
    n = 5000
    probabilities = torch.tensor([0.1, 0.2, 0.05, 0.65], dtype=F64)
    draws = (torch.arange(n, dtype=F64)[:, None] + 0.5) / n
    actions = Categorical(4).sample(probabilities.log().expand(n, 4), draws)
    shares = torch.bincount(actions, minlength=4) / n
    assert (shares - probabilities).abs().max() <= 1 / n


def test_the_parts_of_a_choice_are_drawn_independently():
    n, sizes = 60, (3, 2)
    params = normal(1, 5).expand(n * n, 5)
    grid = (torch.arange(n, dtype=F64) + 0.5) / n
    draws = torch.cartesian_prod(grid, grid)
    actions = MultiCategorical(sizes).sample(params, draws)
    shares = torch.bincount(actions[:, 0] * 2 + actions[:, 1], minlength=6).view(3, 2) / n**2
    first, second = params[0, :3].softmax(0), params[0, 3:].softmax(0)
    assert (shares - first[:, None] * second).abs().max() <= 2 / n


@pytest.mark.parametrize("family", FAMILIES[2:], ids=family_name)
def test_gaussian_samples_are_the_quantiles_of_their_draws(family):
    """The normal CDF of the standardised sample, by torch's erf, gives the draw back."""
    params, _, _ = some(family, rows=200)
    draws = torch.linspace(1e-6, 1 - 1e-6, 600, dtype=F64).view(200, 3)
    u = family.sample(params, draws)
    mean, std = params[:, :3], params[:, 3:].exp()
    close(0.5 * (1 + torch.erf((u - mean) / std / 2**0.5)), draws, rtol=0, atol=1e-12)
    assert torch.equal(family.mode(params), mean)


@each_family
@pytest.mark.parametrize("draw", [0.0, 2.0**-53, 1 - 2.0**-53])
def test_the_most_extreme_draws_give_finite_actions(family, draw):
    params, _, _ = some(family)
    actions = family.sample(params, torch.full((50, family.num_draws), draw, dtype=F64))
    assert actions.isfinite().all() and family.logprobs(params, actions).isfinite().all()


# --- every family ---


@each_family
def test_shapes_and_types_are_as_documented(family):
    params, others, actions = some(family, rows=6)
    assert actions.shape == (6, *family.action_shape) == family.mode(params).shape
    assert actions.is_floating_point() != family.is_discrete
    time = [tensor.unflatten(0, (2, 3)) for tensor in (params, others, actions)]
    assert family.logprobs(time[0], time[2]).shape == family.entropy(time[0]).shape == (2, 3)
    assert torch.equal(family.kl(time[0], time[1]).flatten(), family.kl(params, others))


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_computed_with_in_float32(family, dtype):
    """The same numbers as from the same parameters in float32, and not those of narrow arithmetic."""
    params, others, actions = some(family)
    params, others = params.to(dtype), others.to(dtype)
    actions = actions if family.is_discrete else actions.float()
    wide, wide_others = params.float(), others.float()
    for found, expected in (
        (family.logprobs(params, actions), family.logprobs(wide, actions)),
        (family.entropy(params), family.entropy(wide)),
        (family.kl(params, others), family.kl(wide, wide_others)),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@each_family
def test_gradients_agree_with_finite_differences_twice(family):
    """The second derivative is what Fisher-vector products are made of."""
    params, others, actions = some(family, rows=3)
    params.requires_grad_()
    others.requires_grad_()
    for function in (lambda p: family.logprobs(p, actions), family.entropy, lambda p: family.kl(p, others)):
        assert torch.autograd.gradcheck(function, params)
        assert torch.autograd.gradgradcheck(function, params)
    assert torch.autograd.gradcheck(lambda q: family.kl(params.detach(), q), others)


@each_family
def test_everything_compiles_as_one_graph_and_works_under_torch_func(family):
    """No branch on data, no number taken out of a tensor."""
    params, others, actions = some(family, rows=4)
    draws = torch.rand(4, family.num_draws, dtype=F64)

    def everything(params, others, actions, draws):
        numbers = family.logprobs(params, actions) + family.entropy(params) + family.kl(params, others)
        return numbers, family.sample(params, draws), family.mode(params)

    expected = everything(params, others, actions, draws)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")(params, others, actions, draws)
    for found, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(found, wanted)

    def total(params):
        return everything(params, others, actions, draws)[0].sum()

    leaf = params.clone().requires_grad_()
    close(torch.func.grad(total)(params), torch.autograd.grad(total(leaf), leaf)[0])
    rows = torch.func.vmap(lambda p, q, a: family.logprobs(p, a) + family.kl(p, q))(params, others, actions)
    close(rows, family.logprobs(params, actions) + family.kl(params, others))
