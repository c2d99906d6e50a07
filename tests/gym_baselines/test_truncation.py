"""A time limit is not an end of the world: with the exact value function every advantage is 0, whatever the horizon.

Learning curves cannot show this (CartPole is learnt with every one of the mistakes below), so it is computed: rewards
depend on time alone, the true V is a geometric sum, and an advantage that is not 0 is a mistake of the collector or of GAE.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper

from gym_baselines.collect import Collector
from gym_baselines.envs.vector import as_vector_env
from rlhf.core.advantages import gae
from tests.broken import gae_counts_what_is_masked, gae_ignores_episode_ends, gae_takes_truncation_for_termination
from tests.controls import refute
from tests.gym_baselines.environments import Clock, Oracle, clocks, rollouts, transitions

GAMMA, LAMBDA = 0.9, 0.95
MODES = ["next_step", "same_step", "disabled"]
HORIZONS = [2, 5]
# The borders of these rollouts fall on ends of episodes, on ghost steps, and in the middle of episodes.
LENGTHS = (5, 1, 1, 7, 12, 3, 4, 6)


def late_reward(t):
    """Nothing for three steps, then 1 for ever."""
    return float(t >= 3)


def late_value(t):
    """Its exact value: gamma^(3 - t) / (1 - gamma) before the third step, 1 / (1 - gamma) from then on."""
    return GAMMA ** (3 - t).clamp(min=0) / (1 - GAMMA)


def all_advantages(trajectories, estimator=gae, gamma=GAMMA):
    advantages, _ = estimator(
        trajectories.rewards,
        trajectories.values,
        trajectories.next_values,
        trajectories.terminated,
        trajectories.episode_ends,
        trajectories.mask,
        gamma=gamma,
        gae_lambda=LAMBDA,
    )
    return advantages.numpy()


def largest_advantage(trajectories, estimator=gae):
    return np.abs(all_advantages(trajectories, estimator)).max()


def late_rollouts(mode, horizon):
    return rollouts(lambda: Clock(late_reward, limit=horizon), late_value, mode, lengths=LENGTHS)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("mode", MODES)
def test_with_the_exact_value_function_every_advantage_at_a_time_limit_is_zero(mode, horizon):
    played = late_rollouts(mode, horizon)
    assert max(largest_advantage(trajectories) for trajectories in played) == pytest.approx(0, abs=1e-10)
    assert sum(int(trajectories.episode_ends.sum()) for trajectories in played) > 10
    assert not any(trajectories.terminated.any() for trajectories in played)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize(
    "broken, mode",
    [
        (gae_takes_truncation_for_termination, "next_step"),
        (gae_takes_truncation_for_termination, "same_step"),
        (gae_takes_truncation_for_termination, "disabled"),
        (gae_counts_what_is_masked, "next_step"),  # same_step has nothing to mask
    ],
)
def test_the_advantages_notice_a_broken_estimator(broken, mode, horizon):
    assert max(largest_advantage(trajectories, broken) for trajectories in late_rollouts(mode, horizon)) > 1e-3


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mistake_after_a_reset_does_not_reach_the_episode_before(mode, horizon):
    """V is too high by 1 in the first state of an episode, exact in all others: only first steps may have an advantage."""

    def check(estimator):
        def value(t):
            return late_value(t) + (t == 0)

        for played in rollouts(lambda: Clock(late_reward, limit=horizon), value, mode, lengths=LENGTHS):
            advantages = all_advantages(played, estimator)
            first = played.mask & (played.inputs["observations"][..., 0] == 0)
            assert np.abs(advantages[~first]).max(initial=0.0) == pytest.approx(0, abs=1e-10)
            np.testing.assert_allclose(advantages[first], -1.0, atol=1e-10)

    check(gae)
    refute(check, gae_ignores_episode_ends)


class ForgetsTheFinalObservation(VectorWrapper):
    """A vector environment whose final_obs is the observation after the reset, as if V(next_obs) were computed."""

    def step(self, actions):
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos["final_obs"] = np.array([*observations, None], dtype=object)[:-1]
        return observations, rewards, terminated, truncated, infos


@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_advantages_notice_the_value_of_the_reset_observation_in_same_step(horizon):
    envs = ForgetsTheFinalObservation(clocks(lambda: Clock(late_reward, limit=horizon), "same_step"))
    assert largest_advantage(Collector(envs, Oracle(late_value), seed=0).collect(16).trajectories) > 1e-3


@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_advantages_notice_the_value_of_the_reset_observation_in_next_step(horizon):
    (played,) = rollouts(lambda: Clock(late_reward, limit=horizon), late_value, "next_step", lengths=(16,))
    at_reset = late_value(torch.tensor(0.0, dtype=torch.float64))
    leaky = replace(played, next_values=torch.where(played.episode_ends, at_reset, played.next_values))
    assert largest_advantage(leaky) > 1e-3


@pytest.mark.parametrize("horizon", HORIZONS)
def test_all_autoreset_modes_give_the_same_transitions(horizon):
    next_step, *others = (late_rollouts(mode, horizon) for mode in MODES)
    for row, other in itertools.product(range(2), others):
        real = transitions(next_step, row)
        assert len(real) > 20
        assert real == transitions(other, row)[: len(real)]


@pytest.mark.parametrize("mode", MODES)
def test_ghost_steps_are_not_counted_as_steps(mode):
    """Horizon 2: in NEXT_STEP every third step only resets, also across the borders of rollouts."""
    ghosts = sum(int((~trajectories.mask).sum()) for trajectories in late_rollouts(mode, 2))
    assert ghosts == (2 * (sum(LENGTHS) // 3) if mode == "next_step" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_self_loop_cut_after_fifty_steps_has_no_advantage(mode):
    """Reward 1 for ever, gamma 0.99: V = 100. Taken for a termination, the limit would give the last step -99."""

    def check(estimator):
        (played,) = rollouts(lambda: Clock(limit=50), lambda t: torch.full_like(t, 100.0), mode, lengths=(120,))
        assert np.abs(all_advantages(played, estimator, gamma=0.99)).max() == pytest.approx(0, abs=1e-10)

    check(gae)
    refute(check, gae_takes_truncation_for_termination)


@pytest.mark.parametrize("limit", [None, 4], ids=["terminated", "terminated and truncated at once"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_bootstrapped_after_a_termination(mode, limit):
    """Four steps of reward 1, then the end: V(t) = 1 + gamma + ... of what is left. The value function is wrong after the
    end, by a million; if any of it came through, the advantages would show it."""

    def value(t):
        return torch.where(t >= 4, 1e6, (1 - GAMMA ** (4 - t)) / (1 - GAMMA))

    played = rollouts(lambda: Clock(death=4, limit=limit), value, mode, lengths=LENGTHS)
    assert max(largest_advantage(trajectories) for trajectories in played) == pytest.approx(0, abs=1e-10)
    assert all((trajectories.terminated == trajectories.episode_ends).all() for trajectories in played)


# --- EnvPool, whose environments are written in C++ ---


def bumpy(observations):
    """A value that differs in every state, so that V of a wrong observation shows."""
    return torch.sin(7 * observations[:, 0]) + 3 * observations[:, 1] - 5 * observations[:, 2] ** 2 + observations[:, 3]


def pool(horizon):
    envpool = pytest.importorskip("envpool")
    envs = envpool.make("CartPole-v1", env_type="gymnasium", num_envs=3, seed=5, max_episode_steps=horizon)
    return as_vector_env(envs)


def summed_advantages(envs, actions, value):
    """A_t = sum over the rest of the episode of (gamma lambda)^l delta_(t+l), from the environment's own answers.

    O(T^2) and straight from the definition; None at the steps that only reset.
    """
    observations, after, rewards, ends, real = [envs.reset()[0].copy()], [], [], [], []
    coming_ghost = np.zeros(3, dtype=bool)
    for action in actions:
        observation, reward, terminated, truncated, _ = envs.step(action)
        assert not terminated.any()  # so short an episode is always cut, never over
        real.append(~coming_ghost)
        coming_ghost = truncated
        after.append(observation.copy())
        observations.append(observation.copy())
        rewards.append(reward)
        ends.append(truncated)

    def v(observation):
        return value(torch.from_numpy(observation).double()).numpy()

    deltas = [r + GAMMA * v(n) - v(o) for r, n, o in zip(rewards, after, observations[:-1], strict=True)]
    table = np.full((3, len(actions)), np.nan)
    for row, t in itertools.product(range(3), range(len(actions))):
        if not real[t][row]:
            continue
        table[row, t] = 0.0
        for later in range(t, len(actions)):
            table[row, t] += (GAMMA * LAMBDA) ** (later - t) * deltas[later][row]
            if ends[later][row]:
                break
    return table


@pytest.mark.parametrize("horizon", HORIZONS)
def test_advantages_of_envpools_cartpole_equal_the_sum_by_definition(horizon):
    played = Collector(pool(horizon), Oracle(bumpy), seed=0).collect(23).trajectories
    wanted = summed_advantages(pool(horizon), played.actions.t().numpy(), bumpy)
    assert (np.isnan(wanted) == ~played.mask.numpy()).all()
    assert np.isnan(wanted).any()

    def check(estimator):
        np.testing.assert_allclose(all_advantages(played, estimator), np.nan_to_num(wanted), atol=1e-10)

    check(gae)
    refute(check, gae_takes_truncation_for_termination)
    refute(check, gae_ignores_episode_ends)
    refute(check, gae_counts_what_is_masked)
