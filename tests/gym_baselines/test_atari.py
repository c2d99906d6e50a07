"""The Atari pipeline: lives, FIRE and whole games on a small game of known arithmetic, all of it on Pong, Breakout."""

import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TransformReward

from gym_baselines.envs.atari import EpisodicLife, FireReset, GameReturns, SeededGame, prepare_atari, sign
from gym_baselines.envs.environments import (
    EVALUATION,
    TRAINING,
    EnvironmentConfig,
    check_environment,
    finished_games,
    make_env,
    make_vector_env,
    replay,
    replay_records,
    reports_games,
)
from gym_baselines.envs.vector import AUTORESET_MODES
from rlhf.errors import InputError
from tests.controls import refute

NOOP, FIRE, MOVE = 0, 1, 2


class Lives(gym.Env):
    """Three lives. The ball rests until FIRE; then every step earns 5, and the third step of a life costs it and 2.

    The observation: number of the game, lives left, steps since FIRE (-1: the ball rests).
    """

    observation_space = Box(-1, np.inf, (3,), np.float64)
    action_space = Discrete(3)

    def __init__(self, limit=None, tail=0):
        self.game, self.limit = 0, limit
        self.tail, self.log = tail, []  # tail: steps that a game goes on at 0 lives

    def get_action_meanings(self):
        return ["NOOP", "FIRE", "RIGHT"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game, self.lives, self.ball, self.steps, self.over = self.game + 1, 3, -1, 0, 0
        return self._observe()

    def step(self, action):
        assert self.over <= self.tail, "stepped after the game was over"
        self.log.append(int(action))
        self.steps += 1
        reward = 0.0
        if self.lives == 0:
            self.over += 1
        elif self.ball >= 0:
            self.ball, reward = self.ball + 1, 5.0
            if self.ball == 3:
                self.lives, self.ball, reward = self.lives - 1, -1, -2.0
        elif action == FIRE:
            self.ball = 0
        ended = self.lives == 0 and self.over == self.tail
        self.over += ended
        return *self._observe()[:1], reward, ended, self.steps == self.limit, {"lives": self.lives}

    def _observe(self):
        return np.array([self.game, self.lives, self.ball], dtype=float), {"lives": self.lives}


def learning(game=None, **kw):
    return TransformReward(FireReset(EpisodicLife(GameReturns(game or Lives(**kw)))), sign)


def episode(env):
    """(first observation, rewards, last info) of an episode."""
    first, info = env.reset()
    rewards, over = [], False
    while not over:
        _, reward, terminated, truncated, info = env.step(MOVE)
        rewards.append(reward)
        over = terminated or truncated
        assert len(rewards) < 50, "the episode does not end"
    return first.tolist(), rewards, info


# --- lives, FIRE, whole games ---


def test_each_life_is_an_episode_and_the_game_goes_on_until_the_last():
    """Two games of three lives: the ball is in play from the first step, rewards are signs, one game per three episodes."""

    def check(pipeline):
        env = pipeline()
        for game in (1, 2):
            for lives in (3, 2, 1):
                first, rewards, info = episode(env)
                assert first == [game, lives, 0]
                assert rewards == [1.0, 1.0, -1.0]
                assert ("game_return" in info) == (lives == 1)
        assert env.unwrapped.game == 2

    check(learning)
    refute(check, lambda: TransformReward(FireReset(GameReturns(Lives())), sign))  # a life is no episode
    refute(check, lambda: TransformReward(EpisodicLife(GameReturns(Lives())), sign))  # the ball rests
    refute(check, lambda: FireReset(EpisodicLife(GameReturns(Lives()))))  # rewards as they are


def test_a_finished_game_reports_all_its_rewards_and_steps():
    """Each life earns 5 + 5 - 2. Steps: 3 of play and FIRE in each of 3 lives, and one without action after 2 of them."""

    def check(pipeline):
        env = pipeline()
        for _ in range(2):
            info = [episode(env)[2] for _ in range(3)][-1]
            assert (info["game_return"], info["game_length"]) == (3 * 8.0, 3 * 4 + 2)

    check(learning)
    refute(check, lambda: GameReturns(learning()))  # outside of what it should be inside of
    refute(check, lambda: FireReset(EpisodicLife(GameReturns(TransformReward(Lives(), sign)))))


def test_a_game_that_lingers_at_no_lives_ends_by_itself():
    """With two more steps at 0 lives the last episode is longer by two; nothing is cut at 0 lives."""
    env = learning(tail=2)
    assert [len(episode(env)[1]) for _ in range(6)] == [3, 3, 5] * 2


def test_a_game_cut_by_its_time_limit_is_over():
    """Limit 7: FIRE, three steps, a lost life, no-op, FIRE, one step, and the limit. The next episode is a new game."""
    env = learning(limit=7)
    episode(env)
    first, rewards, info = episode(env)
    assert first == [1, 2, 0] and rewards == [1.0] and info["game_return"] == 13.0
    assert episode(env)[0] == [2, 3, 0]


@pytest.mark.parametrize("limit", [5, 6], ids=["the no-op", "FIRE"])
def test_a_game_that_ends_in_the_steps_of_a_reset_is_begun_anew_and_still_reported(limit):
    env = learning(limit=limit)
    episode(env)
    first, info = env.reset()
    assert first.tolist()[:2] == [2, 3] and info["resumed_game"] is False
    assert (info["game_return"], info["game_length"]) == (8.0, limit)


def test_evaluation_plays_whole_games_and_presses_fire_after_each_lost_life():
    first, rewards, info = episode(FireReset(GameReturns(Lives())))
    assert first == [1, 3, 0] and rewards == [5, 5, -2] * 3
    assert sum(rewards) == info["game_return"] == 24.0


def test_rewards_become_their_signs():
    assert [sign(reward) for reward in (-7, -0.5, 0, 0.1, 400, np.float32(3))] == [-1, -1, 0, 1, 1, 1]


@pytest.mark.parametrize("mode", AUTORESET_MODES)
def test_vector_environments_tell_the_same_games_in_every_mode(mode):
    """12 games' results over rows of which one has a longer game, so that they drift apart; lost lives are no games."""
    tails = iter([0, 0, 1])
    options = EnvironmentConfig(autoreset=mode)
    envs = make_vector_env(lambda: learning(tail=next(tails)), rows=[0, 1], seed=0, options=options)
    assert reports_games(envs)
    envs.reset()
    games, ends_seen = [[], []], np.zeros(2)
    while min(len(found) for found in games) < 6:
        _, _, terminated, truncated, infos = envs.step(np.full(2, MOVE))
        ends = terminated | truncated
        ends_seen += ends
        over, returns, lengths = finished_games(infos, ends)
        for row in over.nonzero()[0]:
            games[row].append((returns[row], lengths[row]))
        assert not (over & ~ends).any() and (returns[~over] == 0).all() and (lengths[~over] == 0).all()
        if mode == "disabled" and ends.any():
            envs.reset(options={"reset_mask": ends})
    assert set(games[0]) == {(24.0, 14)} and set(games[1]) == {(24.0, 15)}
    assert (ends_seen // 3 == [len(found) for found in games]).all()


def test_an_environment_without_games_reports_none():
    assert not reports_games(make_vector_env("CartPole-v1", rows=[0], seed=0))


@pytest.mark.parametrize("mode", AUTORESET_MODES)
def test_a_game_is_replayed_through_its_lost_lives(mode):
    """Stopped anywhere in two games of three lives: at the start, in a life, on a lost one, after a reset, at an end."""

    def go_on(envs, steps):
        """(lives and ball, reward, end) of each step; the number of the game depends on how many were played before."""
        found = []
        for _ in range(steps):
            observations, rewards, terminated, _, _ = envs.step(np.array([MOVE]))
            found.append((observations[0, 1:].tolist(), rewards[0], terminated[0]))
            if mode == "disabled" and terminated[0]:
                found.append(envs.reset(options={"reset_mask": terminated})[0][0, 1:].tolist())
        return found

    options = EnvironmentConfig(autoreset=mode)
    fresh = make_vector_env(learning, rows=[3], seed=0, options=options)
    resumed = set()
    for steps in range(24):
        envs = make_vector_env(learning, rows=[3], seed=0, options=options)
        now = envs.reset()[0][0, 1:].tolist()
        for answer in go_on(envs, steps):
            now = answer[0] if isinstance(answer, tuple) else answer
        records = replay_records(envs, [3])
        resumed.add(len(records[3]["resumed"]))
        assert replay(fresh, records)[0][0, 1:].tolist() == now
        assert fresh.envs[0].episode == envs.envs[0].episode
        assert go_on(fresh, 16) == go_on(envs, 16)
    assert resumed == {0, 1, 2}


# --- Pong and Breakout ---


def atari(name="ALE/Breakout-v5", purpose=TRAINING, **settings):
    pytest.importorskip("ale_py")
    return make_env(name, seed=0, row=0, purpose=purpose, options=EnvironmentConfig(atari=True, **settings))


def test_pong_looks_as_in_the_dqn_paper():
    """A stack of four grey pictures of 84 x 84 bytes, no-ops and FIRE before the first, four frames a step; the limit
    counts steps, of which FIRE is the first."""
    env = atari("ALE/Pong-v5", max_episode_steps=9)
    assert env.observation_space == Box(0, 255, (4, 84, 84), np.uint8) and env.action_space == Discrete(6)
    stack, info = env.reset()
    frames = info["episode_frame_number"]
    assert 1 + 4 <= frames <= 30 + 4
    for step in range(8):
        before, (stack, reward, terminated, truncated, info) = stack, env.step(2)
        assert info["episode_frame_number"] == frames + 4 * (step + 1)
        assert (stack[:3] == before[1:]).all() and stack[3].std() > 10
        assert reward in (-1, 0, 1) and not terminated and truncated == (step == 7)


def test_breakout_restores_exactly_after_games_and_lost_lives():
    """To the last pixel, sticky actions included. The environment that replays has been in other states before."""
    env, fresh = (atari(sticky_actions=0.25) for _ in range(2))
    choose = np.random.default_rng(1)
    now, games, record = env.reset()[0], 0, {"resumed": []}
    while games < 2 or len(record["resumed"]) < 2:
        now, _, terminated, _, info = env.step(int(choose.integers(4)))
        games += "game_return" in info
        if terminated:
            now, _ = env.reset()
            record = env.replay_record()
    for seed in (0, 1):
        fresh.reset()
        for action in np.random.default_rng(seed).integers(4, size=30):
            if fresh.step(int(action))[2]:
                fresh.reset()
    assert (fresh.reset(options={"replay": {0: record}})[0] == now).all()
    for action in choose.integers(4, size=60):
        ours, theirs = env.step(int(action)), fresh.step(int(action))
        assert (ours[0] == theirs[0]).all() and ours[1:] == theirs[1:]
        if ours[2]:
            assert (env.reset()[0] == fresh.reset()[0]).all()


def test_an_evaluation_of_breakout_is_a_whole_game_which_its_seed_begins():
    env = atari(purpose=EVALUATION)
    starts = [env.env.reset(seed=seed)[1]["episode_frame_number"] for seed in (1, 2, 3, 4, 1)]
    assert starts[0] == starts[4] and len(set(starts)) > 1  # the number of no-ops
    env.reset()
    total, steps, over, lives = 0.0, 0, False, set()
    while not over:
        _, reward, terminated, truncated, info = env.step(steps * 7 % 4)
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
        lives.add(info["lives"])
    assert lives == {5, 4, 3, 2, 1, 0} and info["game_return"] == total


class Frames(Lives):
    """Looks like an ALE game to the pipeline, up to what is asked of it."""

    def __init__(self, sticky=0.0):
        super().__init__()
        self.ale, self.played = SimpleNamespace(getFloat=lambda name: sticky, cloneState=str, restoreState=bool), []

    def step(self, action):
        self.played.append(action)
        return np.zeros(3), 0.0, False, False, {"lives": 3}


def test_actions_stick_as_often_as_asked_for():
    """FIRE and MOVE are asked for in turn. With probability p a frame repeats the one before, so the wrong one is played
    if an odd number of frames sticks in a row: in p (1 - p) + p^3 (1 - p) + ... = p / (1 + p) of the frames."""
    wanted = np.where(np.arange(20_000) % 2, FIRE, MOVE)
    for p in (0.0, 0.25, 0.5):
        env = SeededGame(Frames(), sticky_actions=p)
        env.reset(seed=0)
        for action in wanted:
            env.step(action)
        wrong = np.mean(np.array(env.unwrapped.played) != wanted)
        assert abs(wrong - p / (1 + p)) <= 5 * (p / 20_000) ** 0.5


def test_no_action_sticks_beyond_the_end_of_a_game():
    env = SeededGame(Frames())
    env.reset(seed=0)
    env.step(MOVE)
    env.sticky_actions = 1.0
    env.step(FIRE)
    env.reset(seed=0)
    env.step(FIRE)
    assert env.unwrapped.played == [MOVE, MOVE, NOOP]


@pytest.mark.parametrize(
    "env, named",
    [
        ("CartPole-v1", ["CartPole-v1", "ALE/Pong-v5"]),
        ("ALE/Pongg-v5", ["ALE/Pong-v5"]),
        (Lives, ["atari = true", "false"]),
        (lambda: Frames(sticky=0.25), ["repeat_action_probability=0", "sticky_actions"]),
        (lambda: gym.make("ALE/Pong-v5", repeat_action_probability=0.0), ["frameskip=1"]),
    ],
    ids=["another id", "a misspelt game", "a factory of another", "actions stuck twice", "frames skipped twice"],
)
def test_what_the_pipeline_cannot_prepare_is_refused(env, named):
    gym.register_envs(pytest.importorskip("ale_py"))
    with pytest.raises(InputError) as error:
        check_environment(env, EnvironmentConfig(atari=True))
    assert all(part in str(error.value) for part in named), str(error.value)


def test_missing_opencv_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="pip install opencv-python"):
        prepare_atari(Frames(), learning=True)


def test_an_envpool_game_reports_whole_games_too():
    """One life an episode, rewards at most 1 by size, five lives a game: as many games as the lives say."""
    pytest.importorskip("envpool")
    options = EnvironmentConfig(atari=True, vectorization="envpool")
    envs = make_vector_env("ALE/Breakout-v5", rows=[0, 1], seed=0, options=options)
    assert reports_games(envs) and envs.single_action_space == Discrete(4)
    assert envs.single_observation_space == Box(0, 255, (4, 84, 84), np.uint8)
    envs.reset()
    choose = np.random.default_rng(0)
    ends_seen, games = np.zeros(2), [[], []]
    lengths_seen, ghost = np.zeros(2), np.zeros(2, dtype=bool)
    while min(len(found) for found in games) < 1:
        _, rewards, terminated, truncated, infos = envs.step(choose.integers(4, size=2))
        ends = terminated | truncated
        assert np.abs(rewards).max() <= 1
        lengths_seen += ~ghost
        over, returns, lengths = finished_games(infos, ends)
        ends_seen += ends
        for row in over.nonzero()[0]:
            games[row].append(returns[row])
            assert ends_seen[row] == 5 * len(games[row]) and lengths[row] == lengths_seen[row]
            lengths_seen[row] = 0
        ghost = ends
