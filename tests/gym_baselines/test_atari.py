"""The Atari pipeline: lives, FIRE and whole games on a small game of known arithmetic, and all of it on Pong and Breakout."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TransformReward

from gym_baselines.atari import EpisodicLife, FireReset, GameReturns, prepare_atari, sign
from gym_baselines.environments import (
    EVALUATION,
    EnvironmentConfig,
    SeededResets,
    check_environment,
    finished_games,
    make_env,
    make_vector_env,
    replay,
    replay_records,
    reports_games,
)
from gym_baselines.vector import AUTORESET_MODES
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
    """Each life earns 5 + 5 - 2; steps: 3 of play and FIRE for each of 3 lives, and the step without action after 2 of them."""

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


@pytest.mark.parametrize("steps", range(0, 13))
def test_a_game_is_replayed_through_its_lost_lives(steps):
    """Interrupted anywhere in a game of three lives: at its start, in a life, on a lost one, after the reset, at the end."""
    env, fresh = (SeededResets(learning(), seed=0, row=0) for _ in range(2))
    fresh.reset()  # which is in the middle of something else
    fresh.step(MOVE)
    fresh.step(MOVE)
    now, over = env.reset()[0], False
    for _ in range(steps):
        now, _, over, _, _ = env.step(MOVE) if not over else (*env.reset()[:1], 0, False, False, {})
    record = env.replay_record()
    seen, _ = fresh.reset(options={"replay": {0: record}})
    assert seen[1:].tolist() == now[1:].tolist() and fresh.episode == env.episode
    if over:  # the next step only resets
        assert fresh.step(MOVE)[0][1:].tolist() == env.reset()[0][1:].tolist()
    ahead = [[step[0][1:].tolist(), step[1], step[2]] for step in (env.step(MOVE) for _ in range(2))]
    assert [[step[0][1:].tolist(), step[1], step[2]] for step in (fresh.step(MOVE) for _ in range(2))] == ahead


# --- Pong and Breakout ---


def atari(name="ALE/Breakout-v5", rows=(2,), seed=0, purpose=0, **settings):
    pytest.importorskip("ale_py")
    options = EnvironmentConfig(atari=True, **settings)
    return make_vector_env(name, rows=rows, seed=seed, options=options, purpose=purpose)


def actions(steps, seed, choices=4):
    return np.random.default_rng(seed).integers(choices, size=(steps, 1))


def test_pong_looks_as_in_the_dqn_paper():
    """Four grey frames of 84 x 84 bytes; after two steps the stack holds the start three... and each step is 4 frames."""
    envs = atari("ALE/Pong-v5")
    assert envs.single_observation_space == Box(0, 255, (4, 84, 84), np.uint8)
    assert envs.single_action_space.n == 6
    observations, infos = envs.reset()
    before = int(infos["episode_frame_number"][0])
    assert 4 < before <= 1 + 30 + 4 + 60  # no-ops and FIRE
    stack = observations.copy()
    observations, rewards, *_, infos = envs.step(np.array([2]))
    assert int(infos["episode_frame_number"][0]) == before + 4
    assert (observations[0, :3] == stack[0, 1:]).all() and observations.std() > 10
    assert rewards.tolist() == [0.0]


def test_breakout_restores_exactly_after_several_games_and_lost_lives():
    """To the last pixel, sticky actions included; the environment it is compared with has played five games before."""
    envs, fresh = (atari(sticky_actions=0.25) for _ in range(2))
    envs.reset()
    lost = games = 0
    for action in actions(500, seed=1):
        _, _, terminated, truncated, infos = envs.step(action)
        lost += int(terminated[0])
        games += int(finished_games(infos, terminated | truncated)[0][0])
    assert games >= 2 and lost >= 5 * games
    record = replay_records(envs, [2])
    assert record[2]["resumed"], "the interruption should fall after a lost life"
    replay(fresh, record)
    for action in actions(80, seed=2):
        ours, theirs = envs.step(action), fresh.step(action)
        assert all((mine == other).all() for mine, other in zip(ours[:4], theirs[:4], strict=True))


def test_games_begin_with_no_ops_that_the_seed_decides():
    made = atari().envs[0]
    frames = [made.env.reset(seed=seed)[1]["episode_frame_number"] for seed in (1, 2, 3, 4, 1)]  # always a new game?
    assert len(set(frames)) > 1

    def starts(row):
        env = make_env("ALE/Breakout-v5", seed=0, row=row, options=EnvironmentConfig(atari=True), purpose=EVALUATION)
        return [env.reset()[1]["episode_frame_number"] for _ in range(5)]

    assert starts(0) == starts(0) != starts(1)


def test_an_evaluation_of_breakout_is_a_whole_game():
    env = make_env("ALE/Breakout-v5", seed=0, row=0, purpose=EVALUATION, options=EnvironmentConfig(atari=True))
    env.reset()
    total, steps, over, lives = 0.0, 0, False, set()
    while not over:
        _, reward, terminated, truncated, info = env.step(int(steps * 7 % 4))
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
        lives.add(info["lives"])
    assert lives == {5, 4, 3, 2, 1, 0} and info["game_return"] == total
    limited = make_env(
        "ALE/Breakout-v5", seed=0, row=0, purpose=EVALUATION, options=EnvironmentConfig(atari=True, max_episode_steps=9)
    )
    limited.reset()
    assert [limited.step(NOOP)[3] for _ in range(8)] == [False] * 7 + [True]  # FIRE was the first of nine


def test_actions_stick_as_often_as_asked_for():
    """With probability 0.5 a frame repeats the last frame's action: 800 frames of alternating actions, five deviations."""
    played = []

    class Game(Lives):
        ale = None

        def step(self, action):
            played.append(action)
            return np.zeros(3), 0.0, False, False, {"lives": 3}

    from gym_baselines.atari import SeededGame

    env = SeededGame(Game(), sticky_actions=0.5)
    env.unwrapped.np_random = np.random.default_rng(0)
    for frame in range(800):
        env.step(FIRE if frame % 2 else MOVE)
    stuck = sum(action != (FIRE if frame % 2 else MOVE) for frame, action in enumerate(played))
    # A frame shows another action than the asked one if it repeats one that differs: p / (1 + p) of them, here a third.
    assert abs(stuck / 800 - 1 / 3) < 5 * (2 / 9 / 800) ** 0.5 * 1.5


@pytest.mark.parametrize(
    "env, named",
    [
        ("CartPole-v1", ["CartPole-v1", "ALE/Pong-v5"]),
        ("ALE/Pongg-v5", ["ALE/Pong-v5"]),
        (Lives, ["atari = true", "false"]),
        (lambda: gym.make("ALE/Pong-v5", repeat_action_probability=0.0), ["frameskip=1"]),
        (lambda: gym.make("ALE/Pong-v5", frameskip=1), ["repeat_action_probability=0", "sticky_actions"]),
    ],
    ids=["another id", "a misspelt game", "a factory of another", "frames skipped twice", "actions stuck twice"],
)
def test_what_the_pipeline_cannot_prepare_is_refused(env, named):
    ale = pytest.importorskip("ale_py")
    gym.register_envs(ale)
    with pytest.raises(InputError) as error:
        check_environment(env, EnvironmentConfig(atari=True))
    assert all(part in str(error.value) for part in named), str(error.value)


def test_an_envpool_game_reports_whole_games_too():
    """One life an episode, rewards at most 1 by size, five lives a game: as many games as the lives say."""
    pytest.importorskip("envpool")
    envs = atari(rows=range(2), vectorization="envpool")
    assert reports_games(envs) and envs.single_observation_space.shape == (4, 84, 84)
    envs.reset()
    choose = np.random.default_rng(0)
    ends_seen, games = np.zeros(2), [[], []]
    lengths_seen, ghost = np.zeros(2), np.zeros(2, dtype=bool)
    for _ in range(420):
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
    assert min(len(found) for found in games) >= 1


def test_the_pipeline_needs_opencv(monkeypatch):
    pytest.importorskip("ale_py")
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="pip install opencv-python"):
        prepare_atari(gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0), learning=True)
