"""One update: what its gradient is, what must not change it, its minibatches, and when it stops."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import nn

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.distributed import Distributed
from rlhf.errors import TrainingError
from rlhf.training.update import UpdateConfig, split_minibatch
from rlhf.types import PolicyOutputs, Trajectories
from tests import broken
from tests.algorithms.completions import EXACT, prepare, trajectories, with_broken
from tests.controls import refute
from tests.updates import update

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
