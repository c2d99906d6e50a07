"""PPO-Penalty: the exact KL beside the surrogate, its adaptive coefficient, and what an update measures for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import kl_divergence

from rlhf.algorithms.ppo import PPO
from rlhf.core.distributions import Categorical, Gaussian
from rlhf.core.kl import adaptive_penalty_coef, kl_estimate
from rlhf.types import TrainingBatch, Weighting
from tests import broken
from tests.algorithms.linear_policy import (
    F64,
    FAMILIES,
    Linear,
    assert_equal,
    batch_of,
    gradient,
    gradients_of,
    moved,
    run_update,
    settings,
)
from tests.controls import names, refute

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
    assert metrics["measured_kl"] == pytest.approx(wanted, abs=1e-12)


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
    assert state == {} and metrics["measured_kl"] > 0 and metrics["penalty_coef"] == 1.0  # it is no state


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
