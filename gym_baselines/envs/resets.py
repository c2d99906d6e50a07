"""Seeds every reset by its row and episode, so that an episode can be replayed."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rlhf.core.random import ENV_RESET, uniform

TRAINING, EVALUATION = 0, 1  # purposes of an environment: evaluation never uses the start states of training

_SEEDS_AT_ONCE = 32  # episodes whose seeds one vectorised draw gives


def start_seeds(seed: int, rows: Sequence[int], purpose: int = TRAINING) -> list[int]:
    """The seed, below 2**31, of each row's first episode."""
    return (uniform(seed, ENV_RESET, torch.tensor(list(rows)), 0, purpose) * 2**31).long().tolist()


class SeededResets(gym.Wrapper):
    """Seeds every reset, automatic ones included, by (seed, row, episode) alone.

    So an episode does not depend on earlier episodes or other environments, and can be replayed from its actions:
    reset(options={"replay": {row: record}}) does so, with the record that `replay_record` returned. If the replayed
    episode was over, the next step ignores its action and resets, as in NEXT_STEP mode, unless reset is called first.
    """

    def __init__(self, env: gym.Env, *, seed: int, row: int, purpose: int = TRAINING) -> None:
        super().__init__(env)
        self.episode = -1
        self.reports_games = env.has_wrapper_attr("reports_games")
        self._key = (seed, row, purpose)
        self._seeds: tuple[int, list[int]] = (-1, [])  # index of a block of episodes, and their seeds
        self._start = 0  # the episode whose reset began the running game (a reset after a lost life begins none)
        self._actions: list[Any] = []  # actions since that reset
        self._resumed: list[int] = []  # after how many of them a reset resumed the game after a lost life
        self._reset_is_due = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        record = options.pop("replay", {}).get(self._key[1])
        if record is not None:
            return self._replay(record)
        return self._reset(seed, options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._reset_is_due:
            observation, info = self._reset(None, {})
            return observation, 0.0, False, False, info
        # Copied, since a vector environment may pass a view of an array that it overwrites in every step.
        self._actions.append(action.copy() if isinstance(action, np.ndarray) else action)
        return self.env.step(action)

    def replay_record(self) -> dict[str, Any]:
        """The present state: `episode`, the last one that began a game, and `actions`, (steps, ...), made since then.

        resumed: after how many of the actions a reset resumed the same game (Atari's lives), in order.
        """
        space = self.action_space
        actions = np.array(self._actions) if self._actions else np.zeros((0, *(space.shape or ())), space.dtype)
        return {"episode": self._start, "actions": actions, "resumed": list(self._resumed)}

    def _reset(self, seed: int | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        self._reset_is_due = False
        seed = self._seed_of(self.episode) if seed is None else seed
        observation, info = self.env.reset(seed=seed, options=options or None)
        if info.get("resumed_game"):
            self._resumed.append(len(self._actions))
        else:
            self._start, self._actions, self._resumed = self.episode, [], []
        return observation, info

    def _replay(self, record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.env.has_wrapper_attr("game_is_over"):
            self.env.set_wrapper_attr("game_is_over", True)  # abandon the running game
        actions = record["actions"]
        resumed = list(record.get("resumed", ()))
        if not isinstance(actions, np.ndarray):
            actions = np.array(actions, dtype=self.action_space.dtype)
        self.episode = record["episode"] - 1
        observation, info = self._reset(None, {})
        over = False
        for number, action in enumerate(actions):
            for _ in range(resumed.count(number)):
                self._reset(None, {})
            observation, _, terminated, truncated, info = self.step(action)
            over = terminated or truncated
        for _ in range(resumed.count(len(actions))):
            observation, info = self._reset(None, {})
            over = False
        self._reset_is_due = bool(over)
        return observation, info

    def _seed_of(self, episode: int) -> int:
        block, place = divmod(episode, _SEEDS_AT_ONCE)
        if self._seeds[0] != block:
            seed, row, purpose = self._key
            episodes = torch.arange(block * _SEEDS_AT_ONCE, (block + 1) * _SEEDS_AT_ONCE)
            self._seeds = block, (uniform(seed, ENV_RESET, row, episodes, purpose) * 2**31).long().tolist()
        return self._seeds[1][place]
