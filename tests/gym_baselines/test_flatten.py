"""From trajectories to sets of transitions: flattening and shuffling change neither the loss nor the step."""

from dataclasses import replace

import pytest
import torch

from gym_baselines.collect import Collector
from gym_baselines.envs.environments import make_vector_env
from gym_baselines.networks import ActorCritic
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.masking import local_sum
from rlhf.core.random import MINIBATCH, permutation
from rlhf.training.update import UpdateConfig
from rlhf.types import Weighting
from tests.updates import update


@pytest.fixture
def prepared():
    """A PPO batch of 3 CartPoles (global rows 4, 5, 6) and 40 steps, ghosts included; its policy and algorithm."""
    rows = range(4, 7)
    envs = make_vector_env("CartPole-v1", rows=rows, seed=0)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space).double()
    collector = Collector(envs, policy, seed=0, rows=rows)
    ppo = PPO(PPOConfig(kl_coef=0.0, gamma=0.98, entropy_coef=0.01, normalize_advantages="minibatch"))
    batch = ppo.prepare(collector.collect(40).trajectories, 0.0, ppo.initial_state(), local_sum)
    assert (~batch.mask).any()
    return batch, policy, ppo


def test_every_transition_becomes_a_row_of_its_own(prepared):
    batch, _, _ = prepared
    flat = batch.flatten()
    assert flat.rows == 120 and flat.actions.shape == flat.mask.shape == flat.advantages.shape == (120, 1)
    for row, t in [(0, 0), (1, 17), (2, 39)]:
        place = row * 40 + t
        assert flat.row_index[place] == (4 + row) * 40 + t
        assert (flat.inputs["observations"][place] == batch.inputs["observations"][row, t]).all()
        for name in ("actions", "advantages", "returns", "old_values", "old_logprobs", "mask"):
            assert getattr(flat, name)[place, 0] == getattr(batch, name)[row, t]
    assert (flat.row_tokens == 1).all() and len(flat.row_index.unique()) == 120


def test_a_weighting_keeps_its_meaning_when_its_rows_are_taken_apart(prepared):
    """Rows that weigh 1 each, whatever their length: numerator and denominator are the same before and after."""
    batch, _, _ = prepared
    by_row = Weighting(batch.mask / batch.mask.sum(-1, keepdim=True), torch.ones(3))
    batch = replace(batch, weightings={"policy": by_row})
    flat = batch.flatten().weightings["policy"]
    assert flat.weight.flatten().tolist() == by_row.weight.flatten().tolist()
    torch.testing.assert_close(flat.count.sum(), by_row.count.sum())
    assert (flat.weight[~batch.flatten().mask] == 0).all()


def test_a_minibatch_that_is_the_whole_batch_does_not_depend_on_the_order_of_rows(prepared, distributed):
    batch, policy, ppo = prepared
    flat, start = batch.flatten(), {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    config = UpdateConfig(num_epochs=3, minibatch_size=120)
    results = []
    for order in (torch.arange(120), permutation(120, 0, MINIBATCH)):
        policy.load_state_dict(start)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        metrics = update(policy, ppo, flat.select(order), optimizer, config, distributed, seed=0, step=0)
        results.append({**{name: tensor.clone() for name, tensor in policy.state_dict().items()}, **metrics})
    for name, value in results[0].items():
        torch.testing.assert_close(torch.as_tensor(results[1][name]), torch.as_tensor(value), rtol=0, atol=1e-10)


def test_permutations_drawn_at_once_are_those_drawn_one_by_one():
    together = permutation(50, 7, MINIBATCH, 3, torch.arange(4))
    assert together.tolist() == [permutation(50, 7, MINIBATCH, 3, epoch).tolist() for epoch in range(4)]
