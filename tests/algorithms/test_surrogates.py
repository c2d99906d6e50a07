"""The policy objectives of PPO beside one another at ratio 1, and what remains without a baseline."""

from dataclasses import replace
from math import exp

import pytest
import torch

from rlhf.algorithms.ppo import PPO
from rlhf.core.advantages import gae
from rlhf.core.distributions import Categorical
from rlhf.core.masking import local_sum
from rlhf.errors import InputError
from rlhf.types import Trajectories
from tests import broken
from tests.algorithms.linear_policy import (
    EXACT,
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
        loss = algorithm.loss(outputs, far).total
        assert torch.isfinite(loss) and loss.abs() < 10 * exp(20)
