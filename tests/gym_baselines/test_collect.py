"""The collector: what it records, what decides its actions and start states, what it refuses."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import SyncVectorEnv

from gym_baselines.collect import Collector
from gym_baselines.envs.environments import EVALUATION, make_env, make_vector_env
from gym_baselines.networks import ActorCritic, NetworkConfig
from rlhf.errors import InputError, TrainingError
from tests.gym_baselines.environments import Clock, Oracle, clocks, transitions


def cartpole(rows, autoreset="next_step", seed=0):
    envs = make_vector_env("CartPole-v1", rows=rows, seed=seed, autoreset=autoreset)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space).double()
    return Collector(envs, policy, seed=seed, rows=rows)


def test_rows_are_environments_and_time_is_their_steps():
    """Two clocks in step: observations count up, the reward of step t is t, the limit 3 gives a ghost every fourth step."""
    collector = Collector(clocks(lambda: Clock(float, limit=3), "next_step"), Oracle(lambda t: 10 * t), seed=0)
    played = collector.collect(6).trajectories
    times = torch.tensor([0, 1, 2, 3, 0, 1])
    for row in range(2):
        assert played.inputs["observations"][row, :, 0].tolist() == times.tolist()
        assert played.values[row].tolist() == (10 * times).tolist()
        assert played.next_values[row].tolist() == [10, 20, 30, 0, 10, 20]  # the ghost's own is not used
        assert played.rewards[row].tolist() == [0, 1, 2, 0, 0, 1]
        assert played.mask[row].tolist() == [True, True, True, False, True, True]
        assert played.episode_ends[row].tolist() == [False, False, True, False, False, False]
    assert played.row_index.tolist() == [0, 1]


def test_a_rollout_continues_where_the_last_one_stopped():
    """One rollout of 40 steps and rollouts of 1, 2, 3, ... steps are the same experience."""
    whole = [cartpole(range(3)).collect(36).trajectories]
    collector = cartpole(range(3))
    pieces = [collector.collect(length).trajectories for length in range(1, 9)]
    for row in range(3):
        assert np.allclose(transitions(whole, row), transitions(pieces, row), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["same_step", "disabled"])
def test_every_autoreset_mode_plays_the_same_cartpole(mode):
    """A real, stochastic policy: start states and actions depend on (seed, row, episode, step) only."""
    next_step, other = ([cartpole(range(4), mode).collect(200).trajectories] for mode in ("next_step", mode))
    for row in range(4):
        real = transitions(next_step, row)
        assert 150 < len(real) < 200
        assert np.allclose(real, transitions(other, row)[: len(real)], rtol=0, atol=1e-12)


def test_an_environment_does_not_depend_on_the_others_in_its_process():
    together = [cartpole(range(5)).collect(80).trajectories]
    apart = [[cartpole(range(0, 2)).collect(80).trajectories], [cartpole(range(2, 5)).collect(80).trajectories]]
    for row in range(5):
        alone = transitions(apart[row // 2], row % 2) if row < 4 else transitions(apart[1], 2)
        assert np.allclose(transitions(together, row), alone, rtol=0, atol=1e-12)
    assert apart[1][0].row_index.tolist() == [2, 3, 4]


def test_rows_episodes_and_seeds_start_differently_and_evaluation_differs_from_training():
    def starts(seed, row, purpose=0):
        env = make_env("CartPole-v1", seed=seed, row=row, purpose=purpose)
        return [tuple(env.reset()[0].tolist()) for _ in range(40)]

    assert starts(0, 0) == starts(0, 0)
    everything = starts(0, 0) + starts(0, 1) + starts(1, 0) + starts(0, 0, EVALUATION)
    assert len(set(everything)) == 160


def test_finished_episodes_report_their_return_and_length():
    """Reward t at time t, limit 4: return 0 + 1 + 2 + 3 = 6, also for an episode that spans two rollouts."""
    for mode in ("next_step", "same_step", "disabled"):
        collector = Collector(clocks(lambda: Clock(float, limit=4), mode), Oracle(lambda t: t), seed=0)
        finished = torch.cat([collector.collect(length).finished for length in (3, 9)], dim=1)
        ended = finished[finished[..., 1] > 0]
        assert len(ended) == 2 * (2 if mode == "next_step" else 3)
        assert (ended == torch.tensor([6.0, 4.0])).all()


def one_number_and(choices):
    return ActorCritic(Box(-1, 1, (1,)), Discrete(choices), NetworkConfig(hidden_sizes=()))


def test_actions_have_the_policys_probabilities():
    """40 000 draws of a policy with probabilities 0.1, 0.2, 0.7: within five standard errors."""
    policy = one_number_and(3)
    with torch.no_grad():
        policy.policy_net[-1].weight.zero_()
        policy.policy_net[-1].bias.copy_(torch.tensor([0.1, 0.2, 0.7]).log())
        actions, logprobs = policy.sample(torch.zeros(40_000, 1), torch.rand(40_000, 1, dtype=torch.float64))
    shares = torch.bincount(actions, minlength=3) / 40_000
    assert (shares - torch.tensor([0.1, 0.2, 0.7])).abs().max() < 5 * 0.5 / 200
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.2, 0.7])[actions])


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_an_action_of_probability_zero_is_never_drawn(draw):
    policy = one_number_and(4)
    with torch.no_grad():
        policy.policy_net[-1].weight.zero_()
        policy.policy_net[-1].bias.copy_(torch.tensor([-1e9, 0.0, 0.0, -1e9]))
        actions, _ = policy.sample(torch.zeros(1, 1), torch.tensor([[draw]], dtype=torch.float64))
    assert actions.item() in (1, 2)


def test_actions_that_do_not_start_at_zero_reach_the_environment_as_they_are():
    class FromFive(Clock):
        def __init__(self):
            super().__init__()
            self.action_space = Discrete(2, start=5)

        def step(self, action):
            assert action in (5, 6)
            return super().step(action)

    envs = clocks(FromFive, "next_step")
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space)
    played = Collector(envs, policy, seed=0).collect(20).trajectories
    assert set(played.actions.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("mode", ["disabled", None, "Eventually"])
def test_an_autoreset_mode_that_is_not_known_is_refused_by_name(mode):
    envs = SyncVectorEnv([Clock])
    envs.metadata["autoreset_mode"] = mode
    with pytest.raises(InputError, match=r"autoreset_mode.*" + str(mode).replace(".", r"\.")):
        Collector(envs, Oracle(lambda t: t), seed=0)


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_environment(what):
    class Diverges(Clock):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            if self.t == 3:
                observation, reward = (observation, np.nan) if what == "reward" else (observation * np.inf, reward)
            return observation, reward, *rest

    collector = Collector(clocks(Diverges, "next_step"), Oracle(lambda t: t), seed=0)
    with pytest.raises(TrainingError, match=rf"{what} of environment 0 .* step {2 if what == 'reward' else 3}"):
        collector.collect(6)
