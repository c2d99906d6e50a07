"""Evaluation: which episodes are played, how their returns are counted, and what stops it."""

import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from gym_baselines.agent import Agent
from gym_baselines.envs.atari import EpisodicLife, FireReset, GameReturns
from gym_baselines.envs.environments import EnvironmentConfig, make_env
from gym_baselines.evaluate import Evaluation, evaluate
from gym_baselines.networks import ActorCritic, NetworkConfig
from rlhf.errors import InputError, TrainingError
from tests.gym_baselines.environments import Clock


def policy_for(env, **settings):
    made = env() if callable(env) else gym.make(env)
    policy = ActorCritic(made.observation_space, made.action_space, NetworkConfig(**settings), seed=1)
    made.close()
    with torch.no_grad():
        policy.policy_net[-1].weight *= 100
    return policy


class Counting(Clock):
    """A clock that pays its time, ends after a number of steps that its seed decides, and counts who is open."""

    open = 0
    most_open = 0

    def __init__(self):
        super().__init__(float)
        Counting.open += 1
        Counting.most_open = max(Counting.most_open, Counting.open)

    def reset(self, **settings):
        answer = super().reset(**settings)
        self.limit = int(self.np_random.integers(2, 9))
        return answer

    def close(self):
        Counting.open -= 1


@pytest.fixture(autouse=True)
def nobody_is_open():
    Counting.open = Counting.most_open = 0


def known_returns(result):
    """0 + 1 + ... + (length - 1)"""
    return (result.lengths * (result.lengths - 1) / 2).tolist()


# --- which episodes ---


def test_every_episode_counts_once_whole_and_undiscounted():
    result = evaluate(policy_for(Counting), Counting, episodes=40)
    assert len(result.returns) == 40 and result.returns.tolist() == known_returns(result)
    assert set(result.lengths) == set(range(2, 9))  # short ones are not over-represented: one per environment
    assert Counting.open == 0


def test_the_result_unpacks_into_mean_and_deviation():
    mean, std = result = Evaluation(np.array([1.0, 2.0, 6.0]), np.array([1, 1, 1]))
    assert (mean, std) == (3.0, pytest.approx(np.sqrt(14 / 3))) == (result.mean, result.std)
    assert str(result) == "3.0 +- 2.2 (min 1.0, 3 episodes)"


@pytest.mark.parametrize("greedy", [True, False])
def test_an_evaluation_is_a_function_of_its_seed(greedy):
    policy = policy_for("CartPole-v1")
    whole = evaluate(policy, "CartPole-v1", episodes=12, seed=3, greedy=greedy)
    part = evaluate(policy, "CartPole-v1", episodes=5, seed=3, greedy=greedy)
    assert whole.returns[:5].tolist() == part.returns.tolist()
    assert (whole.returns == whole.lengths).all()  # CartPole pays 1 per step
    other = evaluate(policy, "CartPole-v1", episodes=12, seed=4, greedy=greedy)
    assert whole.returns.tolist() != other.returns.tolist()


@pytest.mark.parametrize("greedy", [True, False])
def test_it_does_not_matter_how_many_environments_are_open_at_once(greedy):
    """Actions are drawn by (seed, episode, step), whoever else is playing."""
    policy = policy_for("CartPole-v1").double()
    together = evaluate(policy, "CartPole-v1", episodes=10, greedy=greedy)
    few = evaluate(policy, "CartPole-v1", episodes=10, greedy=greedy, num_envs=3)
    assert few.returns.tolist() == together.returns.tolist()


def test_no_more_environments_are_open_than_asked_for():
    together = evaluate(policy_for(Counting), Counting, episodes=10)
    assert Counting.most_open == 10 and Counting.open == 0
    Counting.most_open = 0
    few = evaluate(policy_for(Counting), Counting, episodes=10, num_envs=3)
    assert few.returns.tolist() == together.returns.tolist()
    assert Counting.most_open == 3 and Counting.open == 0


def test_the_start_states_are_not_those_of_training():
    starts = []

    class Recorder(Counting):
        def reset(self, **settings):
            answer = super().reset(**settings)
            starts.append(int(self.np_random.integers(2**31)))
            return answer

    evaluate(policy_for(Recorder), Recorder, episodes=20)
    for row in range(20):
        make_env(Recorder, seed=0, row=row).reset()
    assert len(starts) == len(set(starts)) == 40


@pytest.mark.parametrize("settings", [{}, {"squash": True}], ids=["Gaussian", "squashed"])
def test_continuous_actions_are_played(settings):
    """Pendulum's return is known to lie between -16.27 * 200 and 0; drawn actions give another one than the greedy."""
    policy = policy_for("Pendulum-v1", **settings)
    greedy, drawn = (evaluate(policy, "Pendulum-v1", episodes=3, greedy=greedy) for greedy in (True, False))
    for result in (greedy, drawn):
        assert (result.lengths == 200).all() and (result.returns > -3254).all() and (result.returns < 0).all()
    assert not np.allclose(greedy.returns, drawn.returns)


# --- whole games ---


class Lives(gym.Env):
    """A game of three lives of two steps each; a step pays 1. FIRE must be pressed first; no-ops count as steps."""

    observation_space = Box(0, 10, (1,), np.float32)
    action_space = Discrete(3)
    length = 6

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._show()

    def step(self, action):
        self.time += 1
        observation, info = self._show()
        return observation, 1.0, self.time == self.length, False, info

    def _show(self):
        return np.array([self.time], np.float32), {"lives": 3 - self.time // 2}


def test_a_lost_life_ends_no_game():
    """Six steps pay 6, whichever wrapper cuts the game into episodes; without the wrappers an episode is the game."""

    def cut():
        return EpisodicLife(GameReturns(Lives()))

    def check(env):
        result = evaluate(policy_for(env), env, episodes=3)
        assert result.returns.tolist() == [6.0] * 3 and result.lengths.tolist() == [6] * 3

    check(cut)
    check(lambda: FireReset(cut()))
    check(lambda: GameReturns(Lives()))
    check(Lives)
    lives = evaluate(policy_for(Lives), lambda: EpisodicLife(Lives()), episodes=3)
    assert lives.returns.tolist() == [2.0] * 3  # nobody reports games: then an episode is what ends


def test_a_game_that_ends_in_the_step_after_a_lost_life_is_reported_too():
    """Length 5: the life lost at 4 is followed by a no-op inside reset, which ends the game there."""

    class Shorter(Lives):
        length = 5

    def cut():
        return EpisodicLife(GameReturns(Shorter()))

    result = evaluate(policy_for(cut), cut, episodes=2)
    assert result.returns.tolist() == [5.0, 5.0] and result.lengths.tolist() == [5, 5]


def test_clipped_rewards_do_not_change_the_reported_game():
    def clipped():
        return gym.wrappers.TransformReward(GameReturns(Lives()), lambda reward: 0.25 * reward)

    assert evaluate(policy_for(clipped), clipped, episodes=2).returns.tolist() == [6.0, 6.0]


# --- what is evaluated ---


def test_an_agent_is_evaluated_on_the_environment_of_its_training():
    limited = {"environment": {"max_episode_steps": 4}}
    agent = Agent(policy=policy_for("CartPole-v1"), env="CartPole-v1", settings=limited)
    assert evaluate(agent, episodes=3).lengths.tolist() == [4, 4, 4]
    assert evaluate(SimpleNamespace(agent=agent), episodes=3).lengths.tolist() == [4, 4, 4]  # a learner
    assert evaluate(agent, episodes=3, options=EnvironmentConfig(max_episode_steps=2)).lengths.tolist() == [2, 2, 2]
    made = Agent(policy=policy_for(Counting), env="just a name", make_env=Counting)
    result = evaluate(made, episodes=3)
    assert result.returns.tolist() == known_returns(result)


def test_normaliser_statistics_do_not_change_in_evaluation():
    policy = policy_for("CartPole-v1", normalize_observations=True)
    policy.normalizer.update(torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    first = evaluate(policy, "CartPole-v1", episodes=5)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert evaluate(policy, "CartPole-v1", episodes=5).returns.tolist() == first.returns.tolist()
    with torch.no_grad():
        policy.normalizer.mean += 1  # they are used
    assert evaluate(policy, "CartPole-v1", episodes=5).returns.tolist() != first.returns.tolist()


class Masked(Clock):
    """Only action t % 3 is allowed at time t; another one ends the episode."""

    action_space = Discrete(3)

    def reset(self, **settings):
        observation, _ = super().reset(**settings)
        return observation, self._info()

    def step(self, action):
        allowed = action == self.t % 3
        observation, reward, _, _, _ = super().step(action)
        return observation, reward, not allowed, self.t == 12, self._info()

    def _info(self):
        return {"action_mask": (np.arange(3) == self.t % 3).astype(np.int8)}


@pytest.mark.parametrize("greedy", [True, False])
def test_action_masks_are_obeyed_where_the_environment_is_said_to_give_them(greedy):
    policy, options = policy_for(Masked), EnvironmentConfig(action_masks=True)
    masked = evaluate(policy, Masked, episodes=4, greedy=greedy, options=options)
    assert masked.lengths.tolist() == [12] * 4
    assert evaluate(policy, Masked, episodes=4, greedy=greedy).lengths.max() < 12
    with pytest.raises(InputError, match="action_mask"):
        evaluate(policy_for(Clock), Clock, episodes=1, options=options)


def test_a_mask_that_allows_nothing_stops_the_evaluation():
    class Nothing(Masked):
        def _info(self):
            return {"action_mask": np.zeros(3, np.int8)}

    with pytest.raises(TrainingError, match="no action"):
        evaluate(policy_for(Nothing), Nothing, episodes=1, options=EnvironmentConfig(action_masks=True))


# --- what stops it ---


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_number_that_is_not_finite_stops_the_evaluation_and_is_named(what, value):
    class Broken(Counting):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            if self.t == 2:
                reward, observation = (value, observation) if what == "reward" else (reward, observation * value)
            return observation, reward, False, self.t == 5, rest[-1]

    with pytest.raises(TrainingError) as error:
        evaluate(policy_for(Broken), Broken, episodes=3)
    assert f"{what} of evaluation episode 0" in str(error.value) and str(value) in str(error.value)
    assert "after 2 steps" in str(error.value) and Counting.open == 0


def test_an_episode_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules[evaluate.__module__], "_LONGEST_EPISODE", 50)
    with pytest.raises(InputError, match="max_episode_steps"):
        evaluate(policy_for(Clock), Clock, episodes=2)


BAD = {
    "no episodes": (lambda: evaluate(policy_for("CartPole-v1"), "CartPole-v1", episodes=0), ["episodes", "0"]),
    "no environments": (lambda: evaluate(policy_for("CartPole-v1"), "CartPole-v1", num_envs=0), ["num_envs", "0"]),
    "a policy alone": (lambda: evaluate(policy_for("CartPole-v1")), ["env"]),
    "something else": (lambda: evaluate("CartPole-v1"), ["agent", "CartPole-v1"]),
    "an unknown environment": (
        lambda: evaluate(policy_for("CartPole-v1"), "CartPol-v1"),
        ["CartPol-v1", "CartPole-v1"],
    ),
    "another task's policy": (
        lambda: evaluate(policy_for("CartPole-v1"), "Acrobot-v1"),
        ["observation_space", "(6,)", "(4,)"],
    ),
    "other actions": (lambda: evaluate(policy_for(Clock), Masked), ["action_space", "Discrete(3)", "Discrete(2)"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, named = BAD[case]
    with pytest.raises(InputError) as error:
        call()
    assert all(part in str(error.value) for part in named), str(error.value)
