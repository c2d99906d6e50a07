"""The policy objectives of PPO beside one another, and PPO-Penalty against autograd of its definition."""

from dataclasses import replace
from math import exp

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal, kl_divergence

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.advantages import gae
from rlhf.core.distributions import Categorical, Gaussian
from rlhf.core.kl import adaptive_penalty_coef, kl_estimate
from rlhf.core.masking import local_sum
from rlhf.errors import InputError
from rlhf.types import PolicyOutputs, TrainingBatch, Trajectories, Weighting
from rlhf.update import UpdateConfig, update
from tests import broken
from tests.controls import names, refute

EXACT = {"rtol": 0, "atol": 1e-12}
F64 = torch.float64
ROWS = 40
FAMILIES = {"categorical": Categorical(4), "gaussian": Gaussian(2)}


class Linear(nn.Module):
    """Parameters of the distribution = observations @ weight; a Gaussian's log-std does not depend on the observation.

    With `tells_kl` false it gives no analytic KL, like a language model.
    """

    def __init__(self, family, *, seed: int = 0, tells_kl: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = family.num_params if family.is_discrete else family.dimensions
        self.family, self.tells_kl = family, tells_kl
        self.weight = nn.Parameter(torch.randn(3, outputs, generator=generator, dtype=F64))
        self.value = nn.Parameter(torch.randn(3, generator=generator, dtype=F64))
        self.log_std = None
        if not family.is_discrete:
            self.log_std = nn.Parameter(0.3 * torch.randn(outputs, generator=generator, dtype=F64))

    def params(self, observations: Tensor) -> Tensor:
        params = observations @ self.weight
        return params if self.log_std is None else torch.cat([params, self.log_std.expand_as(params)], -1)

    def forward(self, inputs, actions, with_values=True, with_entropy=False, old_distribution=None) -> PolicyOutputs:
        params = self.params(inputs["observations"]).unsqueeze(1)
        tells = self.tells_kl and old_distribution is not None
        return PolicyOutputs(
            logprobs=self.family.logprobs(params, actions),
            values=(inputs["observations"] @ self.value).unsqueeze(1) if with_values else None,
            entropy=self.family.entropy(params) if with_entropy else None,
            distribution=params,
            kl=self.family.kl(old_distribution, params) if tells else None,
        )

    def torch_distribution(self, observations: Tensor):
        """The same by torch.distributions."""
        params = self.params(observations)
        if self.family.is_discrete:
            return TorchCategorical(logits=params)
        mean, log_std = params.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)


def moved(policy: Linear, by: float = 0.3) -> Linear:
    """Another policy of the same kind, some way off."""
    other = Linear(policy.family, seed=1, tells_kl=policy.tells_kl)
    with torch.no_grad():
        for parameter, old in zip(other.parameters(), policy.parameters(), strict=True):
            parameter.copy_(old + by * parameter)
    return other


def batch_of(policy: Linear, algorithm: PPO, *, state=None, rows: int = ROWS) -> TrainingBatch:
    """One-step episodes with random rewards and the actions that `policy`, the old one, drew; every fifth is a ghost."""
    generator = torch.Generator().manual_seed(7)
    observations = torch.randn(rows, 3, generator=generator, dtype=F64)
    family = policy.family
    with torch.no_grad():
        params = policy.params(observations)
        actions = family.sample(params, torch.rand(rows, family.num_draws, generator=generator, dtype=F64))
        logprobs = family.logprobs(params, actions).unsqueeze(1)
    mask = (torch.arange(rows) % 5 != 4).unsqueeze(1)
    trajectories = Trajectories(
        inputs={"observations": observations},
        actions=actions.unsqueeze(1),
        mask=mask,
        rewards=torch.randn(rows, 1, generator=generator, dtype=F64),
        sampling_logprobs=logprobs,
        old_logprobs=logprobs,
        values=torch.zeros(rows, 1, dtype=F64),
        next_values=torch.zeros(rows, 1, dtype=F64),
        terminated=torch.ones(rows, 1, dtype=torch.bool),
        episode_ends=torch.ones(rows, 1, dtype=torch.bool),
        old_distribution=params.unsqueeze(1),
        row_tokens=torch.ones(rows, dtype=torch.int64),
        row_index=torch.arange(rows),
    )
    return algorithm.prepare(trajectories, 0.0, algorithm.initial_state() if state is None else state, local_sum)


def settings(**changes) -> PPOConfig:
    defaults = {
        "kl_coef": 0.0,
        "baseline": "none",
        "gae_lambda": 1.0,
        "normalize_advantages": "none",
        "surrogate": "unclipped",
    }
    return PPOConfig(**{**defaults, **changes})


def gradient(policy: Linear, algorithm: PPO, batch: TrainingBatch) -> list[Tensor]:
    """Of the algorithm's loss on the whole batch, for each parameter of the policy (not of the values)."""
    count = {name: w.count.sum() for name, w in batch.weightings.items()}
    old = {} if batch.old_distribution is None else {"old_distribution": batch.old_distribution}
    needs = algorithm.needs
    outputs = policy(batch.inputs, batch.actions, with_values="values" in needs, with_entropy="entropy" in needs, **old)
    loss, _ = algorithm.loss(outputs, replace(batch, denominators=count))
    return gradients_of(loss, policy)


def gradients_of(loss: Tensor, policy: Linear) -> list[Tensor]:
    parameters = [parameter for name, parameter in policy.named_parameters() if name != "value"]
    return list(torch.autograd.grad(loss, parameters))


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


# --- at ratio 1 all surrogates are one ---


def check_equal_at_ratio_one(surrogate: str, family: str) -> None:
    policy = Linear(FAMILIES[family])
    algorithm = PPO(settings(surrogate=surrogate, dual_clip=3.0 if surrogate == "clipped" else None))
    batch = batch_of(policy, algorithm)
    taken = policy.torch_distribution(batch.inputs["observations"]).log_prob(batch.actions.squeeze(1))
    kept = batch.mask.squeeze(1)
    wanted = gradients_of(-(taken * batch.advantages.squeeze(1))[kept].mean(), policy)
    assert_equal(gradient(policy, algorithm, batch), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("surrogate", ["score", "unclipped", "clipped"])
def test_at_the_old_policy_every_surrogate_has_the_policy_gradient(surrogate, family):
    check_equal_at_ratio_one(surrogate, family)


@pytest.mark.parametrize("surrogate", ["score", "unclipped", "clipped"])
def test_the_check_at_the_old_policy_notices(surrogate, monkeypatch):
    function = f"rlhf.algorithms.ppo.{surrogate}_surrogate"
    for spoil in (lambda x: -x, lambda x: 1.01 * x):
        real = getattr(__import__("rlhf.core.losses", fromlist=["x"]), f"{surrogate}_surrogate")
        monkeypatch.setattr(function, lambda *args, real=real, spoil=spoil, **kw: spoil(real(*args, **kw)))
        refute(lambda name: check_equal_at_ratio_one(name, "categorical"), surrogate)


def test_away_from_the_old_policy_they_part():
    old = Linear(Categorical(4))
    new = moved(old)
    found = {}
    for surrogate in ("score", "unclipped", "clipped"):
        algorithm = PPO(settings(surrogate=surrogate))
        found[surrogate] = gradient(new, algorithm, batch_of(old, algorithm))[0]
    for one, other in (("score", "unclipped"), ("unclipped", "clipped"), ("score", "clipped")):
        assert (found[one] - found[other]).abs().max() > 1e-3


def test_the_score_surrogate_does_not_read_the_old_policy():
    policy, algorithm = Linear(Categorical(4)), PPO(settings(surrogate="score"))
    batch = batch_of(policy, algorithm)
    other = replace(batch, old_logprobs=batch.old_logprobs - 1.0)
    assert_equal(gradient(policy, algorithm, other), gradient(policy, algorithm, batch))


# --- PPO-Penalty: -r A + beta KL(old || new) ---


def definition(old: Linear, new: Linear, batch: TrainingBatch, beta: float) -> Tensor:
    """Section 4 of the paper by torch.distributions, on the rows that count."""
    observations = batch.inputs["observations"]
    before, after = old.torch_distribution(observations), new.torch_distribution(observations)
    actions, kept = batch.actions.squeeze(1), batch.mask.squeeze(1)
    ratio = (after.log_prob(actions) - before.log_prob(actions).detach()).exp()
    detached = old.torch_distribution(observations.detach())
    kl = kl_divergence(detached, after)
    return (-ratio * batch.advantages.squeeze(1) + beta * kl)[kept].mean()


def check_penalty(family: str, beta: float = 0.7) -> None:
    old = Linear(FAMILIES[family])
    new = moved(old)
    algorithm = PPO(settings(penalty_coef=beta))
    batch = batch_of(old, algorithm)
    for parameter in old.parameters():
        parameter.requires_grad_(False)
    assert_equal(gradient(new, algorithm, batch), gradients_of(definition(old, new, batch, beta), new))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penalised_loss_has_the_gradient_of_its_definition(family):
    check_penalty(family)


class BackwardsGaussian(Gaussian):
    def kl(self, params, other):
        return super().kl(other, params)


class BackwardsCategorical(Categorical):
    def kl(self, params, other):
        return super().kl(other, params)


@pytest.mark.parametrize(
    ("family", "backwards"), [("gaussian", BackwardsGaussian(2)), ("categorical", BackwardsCategorical(4))]
)
def test_the_check_of_the_penalty_notices_the_other_direction_of_the_kl(family, backwards, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, backwards)
    refute(check_penalty, family)


def test_the_check_of_the_penalty_notices_an_estimate_in_place_of_the_exact_kl():
    def check(tells_kl: bool) -> None:
        old = Linear(FAMILIES["categorical"])
        new = moved(old)
        new.tells_kl = tells_kl
        algorithm = PPO(settings(penalty_coef=0.7))
        batch = batch_of(old, algorithm)
        assert_equal(gradient(new, algorithm, batch), gradients_of(definition(old, new, batch, 0.7), new))

    check(True)
    refute(check, False)


def test_the_penalty_is_added_to_any_surrogate_and_weighs_by_the_present_coefficient():
    old = Linear(Categorical(4))
    new = moved(old)
    for surrogate in ("clipped", "score"):
        plain, penalised = PPO(settings(surrogate=surrogate)), PPO(settings(surrogate=surrogate, penalty_coef=1.0))
        batch = batch_of(old, penalised, state={"penalty_coef": 2.5})
        assert batch.coefficients["penalty_coef"] == 2.5 and batch.metrics["penalty_coef"] == 2.5
        kl = FAMILIES["categorical"].kl(batch.old_distribution, new.params(batch.inputs["observations"]).unsqueeze(1))
        alone = gradients_of(kl[batch.mask].mean(), new)
        without = gradient(new, plain, batch_of(old, plain))
        wanted = [first + 2.5 * second for first, second in zip(without, alone, strict=True)]
        assert_equal(gradient(new, penalised, batch), wanted)


def check_fallback(kl_estimate) -> None:
    """Every action once, weighted by its probability under the old policy: the mean of the fallback's gradient."""
    old = Linear(Categorical(4))
    new = moved(old, by=0.8)
    new.tells_kl = False
    observations = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    actions = torch.arange(4).repeat(5).unsqueeze(1)
    each = observations.repeat_interleave(4, 0)
    with torch.no_grad():
        params = old.params(each).unsqueeze(1)
        logprobs = Categorical(4).logprobs(params, actions)
    algorithm = PPO(settings(penalty_coef=1.0))
    template = batch_of(old, algorithm, rows=20)
    weight = logprobs.exp() / 5
    weighting = Weighting(weight, weight.sum(-1))
    batch = replace(
        template,
        inputs={"observations": each},
        actions=actions,
        mask=torch.ones_like(template.mask),
        old_logprobs=logprobs,
        advantages=torch.zeros_like(logprobs),
        old_distribution=params,
        weightings=dict.fromkeys(template.weightings, weighting),
    )
    wanted = kl_divergence(
        TorchCategorical(logits=old.params(observations).detach()), new.torch_distribution(observations)
    ).mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.algorithms.ppo.kl_estimate", kl_estimate)
        assert_equal(gradient(new, algorithm, batch), gradients_of(wanted, new))


def test_without_an_exact_kl_the_fallback_has_its_gradient_in_expectation():
    check_fallback(kl_estimate)


FALLBACKS = [broken.kl_swaps_its_arguments, broken.kl_is_zero, broken.kl_has_the_wrong_sign]


@pytest.mark.parametrize("variant", FALLBACKS, ids=names(FALLBACKS))
def test_the_check_of_the_fallback_notices(variant):
    refute(check_fallback, variant)


def test_the_check_of_the_fallback_notices_the_estimator_whose_gradient_is_biased():
    refute(check_fallback, lambda sampler, other, estimator: kl_estimate(sampler, other, "k2"))


# --- the adaptive coefficient ---


def check_table(adaptive_penalty_coef) -> None:
    target = 0.01
    table = {0.5: 0.5, 1.0: 1.0, 2.0: 2.0, 1 / 1.49: 1.0, 1 / 1.51: 0.5, 1.49: 1.0, 1.51: 2.0, 0.0: 0.5, 100.0: 2.0}
    for kl, factor in table.items():
        assert adaptive_penalty_coef(3.0, target * kl, target=target) == 3.0 * factor, kl
    assert adaptive_penalty_coef(3.0, target / 1.5, target=target) == 3.0
    assert adaptive_penalty_coef(3.0, 1.5 * target, target=target) == 3.0


def test_the_coefficient_is_halved_kept_or_doubled_around_1_5_times_the_target():
    check_table(adaptive_penalty_coef)


def adapts_the_wrong_way(penalty_coef, kl, *, target, floor=1e-4):
    return adaptive_penalty_coef(penalty_coef, target**2 / max(kl, 1e-12), target=target)


def adapts_by_rllibs_rule(penalty_coef, kl, *, target, floor=1e-4):
    return penalty_coef * (1.5 if kl > 2 * target else 0.5 if kl < 0.5 * target else 1.0)


def adapts_without_a_band(penalty_coef, kl, *, target, floor=1e-4):
    return penalty_coef * (2.0 if kl > target else 0.5)


RULES = [adapts_the_wrong_way, adapts_by_rllibs_rule, adapts_without_a_band]


@pytest.mark.parametrize("variant", RULES, ids=names(RULES))
def test_the_check_of_the_table_notices(variant):
    refute(check_table, variant)


def check_floor(adaptive_penalty_coef) -> None:
    coefficient = 1.0
    for _ in range(3000):  # 2 ** -1075 is 0 in double precision
        coefficient = adaptive_penalty_coef(coefficient, 0.0, target=0.01)
    assert 0 < coefficient < 1e-3
    for _ in range(40):
        coefficient = adaptive_penalty_coef(coefficient, 1.0, target=0.01)
    assert coefficient > 1.0


def test_however_often_it_is_halved_the_coefficient_grows_back():
    check_floor(adaptive_penalty_coef)


def halves_to_nothing(penalty_coef, kl, *, target):
    return penalty_coef / 2 if kl < target / 1.5 else penalty_coef * 2


def test_the_check_of_the_floor_notices_a_coefficient_that_vanishes():
    refute(check_floor, halves_to_nothing)


def test_a_coefficient_below_the_floor_is_never_doubled_by_being_halved():
    """A user may start below the floor; a KL that is too small must not raise the penalty."""
    assert adaptive_penalty_coef(1e-5, 0.0, target=0.01) <= 1e-5


# --- what update measures, and when it adapts ---


def run_update(distributed, *, epochs=3, policy=None, minibatch_size=None, state=None, learning_rate=0.05, **changes):
    """One real update by plain gradient descent. Returns (old policy, new policy, batch, state, metrics)."""
    old = policy or Linear(Categorical(4))
    new = moved(old, by=0.0)
    algorithm = PPO(settings(**{"penalty_coef": 1.0, **changes}))
    state = algorithm.initial_state() if state is None else state
    batch = batch_of(old, algorithm, state=state)
    config = UpdateConfig(num_epochs=epochs, minibatch_size=minibatch_size, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(new.parameters(), lr=learning_rate)
    metrics = update(new, algorithm, batch, optimizer, config, distributed, seed=0, step=0, state=state)
    return old, new, batch, state, metrics


def exact_kl(old: Linear, new: Linear, batch: TrainingBatch) -> float:
    observations = batch.inputs["observations"][batch.mask.squeeze(1)]
    return kl_divergence(old.torch_distribution(observations), new.torch_distribution(observations)).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("minibatch_size", [None, 16])
def test_the_measured_kl_is_the_exact_one_of_the_whole_batch_after_the_update(distributed, family, minibatch_size):
    policy = Linear(FAMILIES[family])
    old, new, batch, _, metrics = run_update(distributed, policy=policy, minibatch_size=minibatch_size)
    wanted = exact_kl(old, new, batch)
    assert wanted > 1e-5
    assert abs(metrics["measured_kl"] - wanted) < 1e-12


def test_the_check_of_the_measured_kl_notices_the_other_direction(distributed):
    old, new, batch, _, metrics = run_update(distributed, policy=Linear(BackwardsCategorical(4)))
    assert abs(metrics["measured_kl"] - exact_kl(old, new, batch)) > 1e-8


@pytest.mark.parametrize(("adapts", "times"), [("rollout", 1), ("epoch", 3)])
@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5)])
@pytest.mark.parametrize("minibatch_size", [None, 16])
def test_the_coefficient_adapts_once_per_rollout_or_once_per_epoch(
    distributed, adapts, times, target, factor, minibatch_size
):
    *_, state, _ = run_update(
        distributed, penalty_target=target, penalty_adapts=adapts, minibatch_size=minibatch_size, epochs=3
    )
    assert state["penalty_coef"] == factor**times


def test_a_fixed_coefficient_stays_and_its_kl_is_measured_all_the_same(distributed):
    *_, state, metrics = run_update(distributed)
    assert state["penalty_coef"] == 1.0 and metrics["measured_kl"] > 0 and metrics["penalty_coef"] == 1.0


def test_without_a_penalty_nothing_is_measured(distributed):
    *_, metrics = run_update(distributed, penalty_coef=0.0)
    assert "measured_kl" not in metrics and "penalty_coef" not in metrics


def test_the_next_rollout_uses_the_adapted_coefficient_and_this_ones_metric_the_old_one(distributed):
    *_, state, metrics = run_update(distributed, penalty_target=1e-9)
    assert metrics["penalty_coef"] == 1.0 and state["penalty_coef"] == 2.0
    *_, state, metrics = run_update(distributed, penalty_target=1e-9, state=state)
    assert metrics["penalty_coef"] == 2.0 and state["penalty_coef"] == 4.0


def by_definition(old: Linear, batch: TrainingBatch, *, epochs: int, target: float, adapts: str) -> Linear:
    """The same epochs of gradient descent with autograd of the definition and the rule written out."""
    new, beta = moved(old, by=0.0), 1.0
    for _ in range(epochs):
        loss = definition(old, new, batch, beta)
        parameters = [parameter for name, parameter in new.named_parameters() if name != "value"]
        with torch.no_grad():
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.05 * slope
        if adapts == "epoch":
            kl = exact_kl(old, new, batch)
            beta = beta / 2 if kl < target / 1.5 else beta * 2 if kl > 1.5 * target else beta
    return new


@pytest.mark.parametrize("adapts", ["rollout", "epoch"])
def test_an_update_follows_the_definition_with_the_coefficient_that_each_epoch_left(distributed, adapts):
    target = 2e-3
    old, new, batch, *_ = run_update(distributed, epochs=6, penalty_target=target, penalty_adapts=adapts)
    wanted = by_definition(old, batch, epochs=6, target=target, adapts=adapts)
    assert_equal([new.weight.detach()], [wanted.weight.detach()])
    other = by_definition(old, batch, epochs=6, target=target, adapts="rollout" if adapts == "epoch" else "epoch")
    assert (new.weight - other.weight).abs().max() > 1e-6  # the two differ here, so the comparison means something


@pytest.mark.parametrize("start", [0.25, 16.0])
def test_the_rule_brings_the_kl_to_its_target_from_either_side(distributed, start):
    """Repeated rollouts of one problem: KL(old || new) settles within a factor 1.5 of the target."""
    policy, state, target, seen = Linear(Categorical(4)), {"penalty_coef": start}, 0.003, []
    for _ in range(6):
        *_, metrics = run_update(
            distributed, policy=policy, state=state, epochs=25, penalty_target=target, learning_rate=0.1
        )
        seen.append(metrics["measured_kl"])
    assert not target / 1.5 <= seen[0] <= 1.5 * target
    assert target / 1.5 <= seen[-1] <= 1.5 * target


# --- no baseline ---


def check_returns_to_go(gae) -> None:
    """Two episodes in one row and a ghost between them: 1 + .5 * 2 + .25 * 4 = 3 and so on; values of 0 are given."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, 7.0, 3.0, 5.0]], dtype=F64)
    mask = torch.tensor([[True, True, True, False, True, True]])
    ends = torch.tensor([[False, False, True, False, False, True]])
    zeros = torch.zeros_like(rewards)
    trajectories = Trajectories(
        inputs={"observations": zeros},
        actions=zeros.long(),
        mask=mask,
        rewards=rewards,
        sampling_logprobs=zeros,
        old_logprobs=zeros,
        values=zeros,
        next_values=zeros,
        terminated=torch.tensor([[False, False, False, False, False, True]]),  # the first is cut by a time limit
        episode_ends=ends,
        row_tokens=torch.tensor([6]),
        row_index=torch.tensor([0]),
    )
    algorithm = PPO(settings(surrogate="score", gamma=0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.algorithms.ppo.gae", gae)
        batch = algorithm.prepare(trajectories, 0.0, algorithm.initial_state(), local_sum)
    wanted = torch.tensor([[3.0, 4.0, 4.0, 0.0, 5.5, 5.0]], dtype=F64)
    torch.testing.assert_close(batch.advantages, wanted, **EXACT)
    assert "explained_variance" not in batch.metrics and "values" not in algorithm.needs


def test_without_a_baseline_the_advantages_are_the_discounted_returns_to_go_of_each_episode():
    check_returns_to_go(gae)


GO = [broken.gae_ignores_episode_ends, broken.gae_cuts_only_at_terminations, broken.gae_counts_what_is_masked]


@pytest.mark.parametrize("variant", GO, ids=names(GO))
def test_the_check_of_returns_to_go_notices(variant):
    refute(check_returns_to_go, variant)


def test_without_a_baseline_the_loss_leaves_the_value_function_alone(distributed):
    old, new, *_ = run_update(distributed, penalty_coef=0.0, surrogate="score", epochs=1)
    assert torch.equal(old.value, new.value) and not torch.equal(old.weight, new.weight)


def test_a_baseline_of_none_with_lambda_below_one_is_refused():
    with pytest.raises(InputError, match="gae_lambda"):
        settings(gae_lambda=0.95)


def test_adapting_a_penalty_of_zero_is_refused():
    with pytest.raises(InputError, match=r"penalty_target.*penalty_coef"):
        settings(penalty_target=0.01)


def test_a_penalty_stays_finite_where_the_ratio_overflows():
    """Log-probs 60 nats apart: the clamp of the log-ratio keeps the fallback at exp(20) at most."""
    policy, algorithm = Linear(Categorical(4), tells_kl=False), PPO(settings(penalty_coef=1.0))
    batch = batch_of(policy, algorithm)
    for shift in (-60.0, 60.0):
        outputs = policy(batch.inputs, batch.actions)
        far = replace(batch, old_logprobs=batch.old_logprobs + shift, denominators={"policy": torch.tensor(32.0)})
        loss, _ = algorithm.loss(outputs, far)
        assert torch.isfinite(loss) and loss.abs() < 10 * exp(20)
