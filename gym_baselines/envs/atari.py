"""Prepares Atari games as in the DQN paper (Mnih et al. 2015, Nature 518).

Gymnasium provides the random number of no-ops at the start, the frame skip with its maximum over two frames, the grey
84 x 84 image and the frame stack. This file adds what it lacks: pressing FIRE to start a game, lives as episodes
without a new game after each of them, returns of whole games, and fast seeding.
"""

from typing import Any

import gymnasium as gym
from gymnasium.utils.seeding import np_random
from gymnasium.wrappers import AtariPreprocessing, TimeLimit, TransformReward

from rlhf.errors import InputError

NOOP, FIRE = 0, 1
GAME_RESULT = ("game_return", "game_length")  # keys of the info that reports a finished game

Reset = tuple[Any, dict[str, Any]]
Step = tuple[Any, Any, bool, bool, dict[str, Any]]


def prepare_atari(
    game: gym.Env, *, learning: bool, sticky_actions: float = 0.0, max_episode_steps: int | None = None
) -> gym.Env:
    """Apply all wrappers except the frame stack: observations are uint8 (84, 84), one step is four frames.

    game: an ALE environment made with frameskip=1 and repeat_action_probability=0. learning: a lost life ends the
    episode, and rewards are replaced by their sign. Otherwise (evaluation) an episode is a whole game with true rewards.
    sticky_actions: see SeededGame. max_episode_steps: truncates a game.
    """
    try:
        if game.unwrapped.ale.getFloat("repeat_action_probability") > 0:  # type: ignore[attr-defined]
            raise InputError("Make the game with repeat_action_probability=0, and set sticky_actions instead.")
        seeded = SeededGame(game, sticky_actions)
        env: gym.Env = AtariPreprocessing(seeded, noop_max=30, frame_skip=4, screen_size=84, grayscale_obs=True)
    except gym.error.DependencyNotInstalled as error:
        raise InputError("Atari pictures are scaled by OpenCV, which is missing: pip install opencv-python") from error
    except (AttributeError, TypeError) as error:
        raise InputError(f"atari = true prepares ALE games, but {game} is not one: set it to false.") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"atari = true needs a game made with frameskip=1: {error}") from error
    if max_episode_steps is not None:
        env = TimeLimit(env, max_episode_steps)
    env = GameReturns(env)
    if learning:
        env = EpisodicLife(env)
    if game.unwrapped.get_action_meanings()[FIRE : FIRE + 1] == ["FIRE"]:  # type: ignore[attr-defined]
        env = FireReset(env)
    return TransformReward(env, sign) if learning else env


def sign(reward: Any) -> float:
    """-1, 0 or 1: the reward that training uses."""
    return float(reward > 0) - float(reward < 0)


class SeededGame(gym.Wrapper):
    """Seeds a game without reloading it: a seed decides how many no-ops start it, and which actions stick.

    Given a seed, the ALE would reload the game, which takes half a second, although nothing in it is random without the
    ALE's own sticky actions. An unseeded reset is fast but leaves traces of the last game (in Freeway, for one), so
    this wrapper restores the state after the first reset: every game begins in the same machine state. Sticky actions
    are done here, by the ALE's rule: in each frame, with probability `sticky_actions`, the last frame's action is
    played instead (Machado et al. 2018, "Revisiting the Arcade Learning Environment").
    """

    def __init__(self, env: gym.Env, sticky_actions: float = 0.0) -> None:
        super().__init__(env)
        self.sticky_actions = sticky_actions
        self._last = NOOP
        self._start: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        ale = self.unwrapped.ale  # type: ignore[attr-defined]
        if seed is not None:
            self.unwrapped.np_random = np_random(seed)[0]
        self._last = NOOP
        answer = self.env.reset(options=options)
        if self._start is None:
            self._start = ale.cloneState()
        else:
            ale.restoreState(self._start)
        return answer

    def step(self, action: Any) -> Step:
        if not self.sticky_actions or self.unwrapped.np_random.random() >= self.sticky_actions:
            self._last = action
        return self.env.step(self._last)


class GameReturns(gym.Wrapper):
    """Reports a finished game: info["game_return"], the sum of its rewards, and info["game_length"], its steps.

    Must be inside all wrappers that split games into episodes or change rewards.
    """

    reports_games = True

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._return, self._length = 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        self._return, self._length = 0.0, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        self._length += 1
        if terminated or truncated:
            info = {**info, **dict(zip(GAME_RESULT, (self._return, self._length), strict=True))}
        return observation, reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost, so that it costs all future reward; the next episode resumes the game.

    reset() starts a new game only if the last one is over. Otherwise it makes one step with NOOP and sets
    info["resumed_game"]. Needs info["lives"].
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.game_is_over = True
        self._lives = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        result: dict[str, Any] = {}
        if not self.game_is_over:
            observation, _, terminated, truncated, info = self.env.step(NOOP)
            if not (terminated or truncated):
                self._lives = info["lives"]
                return observation, {**info, "resumed_game": True}
            result = {key: info[key] for key in GAME_RESULT if key in info}  # that step ended the game: report it here
        observation, info = self.env.reset(seed=seed, options=options)
        self.game_is_over = False
        self._lives = info["lives"]
        return observation, {**info, **result, "resumed_game": False}

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.game_is_over = terminated or truncated
        # Not at 0 lives: some games show 0 for some frames before they end, and then terminate by themselves.
        lost = 0 < info["lives"] < self._lives
        self._lives = info["lives"]
        return observation, reward, terminated or lost, truncated, info


class FireReset(gym.Wrapper):
    """Presses FIRE where a game waits for it: after a reset, and after a lost life that does not end the episode."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._lives = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        _, info = self.env.reset(seed=seed, options=options)
        observation, _, terminated, truncated, fired = self.env.step(FIRE)
        info = {**info, **fired}
        if terminated or truncated:
            observation, again = self.env.reset(options=options)  # without a seed, so that the random numbers continue
            info |= again
        self._lives = info.get("lives", 0)
        return observation, info

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        lost = 0 < info.get("lives", 0) < self._lives
        self._lives = info.get("lives", 0)
        if lost and not (terminated or truncated):
            observation, more, terminated, truncated, info = self.env.step(FIRE)
            reward = float(reward) + float(more)
            self._lives = info["lives"]
        return observation, reward, terminated, truncated, info
