"""Reads the steps and infos of vector environments, and adapts EnvPool's and the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from gym_baselines.envs.pool import EnvPoolVectorEnv, is_pool
from gym_baselines.envs.resets import start_seeds
from rlhf.errors import InputError, TrainingError

AUTORESET_MODES = {
    "next_step": AutoresetMode.NEXT_STEP,
    "same_step": AutoresetMode.SAME_STEP,
    "disabled": AutoresetMode.DISABLED,
}


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """The autoreset mode of a vector environment. Raises InputError if the collector does not support it."""
    mode = (getattr(envs, "metadata", None) or {}).get("autoreset_mode")
    if not isinstance(mode, AutoresetMode) or mode not in AUTORESET_MODES.values():
        known = ", ".join(str(mode) for mode in AUTORESET_MODES.values())
        raise InputError(
            f"The vector environment's metadata['autoreset_mode'] is {mode!r}, but only {known} are known here: which "
            "steps are real and which observation ends an episode depends on it. Build it with autoreset_mode=NEXT_STEP."
        )
    return mode


# --- restoring the middle of an episode ---


def replays(envs: VectorEnv) -> bool:
    """Whether running episodes can be restored by replay: true for all that make_vector_env builds but EnvPool."""
    return bool(getattr(envs, "replays", False))


def replay_records(envs: VectorEnv, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Records from which `replay` brings each row back to its present state; see SeededResets.replay_record."""
    return dict(zip(rows, envs.call("replay_record"), strict=True))  # type: ignore[attr-defined]


def replay(envs: VectorEnv, records: Mapping[int, Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Restore every row from its record; returns the observations and infos of the last replayed steps.

    The caller should compare the observations with those it saved: they differ if an environment is not a function of
    its seed and its actions.
    """
    return envs.reset(options={"replay": records})


# --- infos ---


def reports_games(envs: VectorEnv) -> bool:
    """Whether infos report whole games, of which episodes are only parts (Atari's lives)."""
    return bool(getattr(envs, "reports_games", False))


def finished_games(infos: Mapping[str, Any], ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole games that a step ended: (rows,) where one ended, its undiscounted return and its length, 0 elsewhere.

    ends: (rows,) whether an episode ended; a lost life ends an episode but not the game. In SAME_STEP the result of a
    game is in infos["final_info"], in the other modes in infos itself.
    """
    over, returns, lengths = np.zeros(len(ends), dtype=bool), np.zeros(len(ends)), np.zeros(len(ends), dtype=np.int64)
    for source in (infos, infos.get("final_info", {})):
        if "game_return" in source:
            now = source["_game_return"]
            over |= now
            returns[now], lengths[now] = source["game_return"][now], source["game_length"][now]
    return over, returns, lengths


def action_masks(
    infos: Mapping[str, Any], num_choices: int, ends: np.ndarray, previous: np.ndarray | None = None
) -> np.ndarray:
    """The actions that are allowed in the observations that came with these infos, (rows, num_choices) bool.

    ends: (rows,) whether the observation is the last of its episode. No action follows it, so if its mask is missing or
    allows nothing, everything is allowed. previous: masks of rows that these infos leave out (after a partial reset).
    Raises InputError if a mask is missing or of another size, TrainingError if no action is allowed.
    """
    masks = np.ones((len(ends), num_choices), dtype=bool) if previous is None else previous.copy()
    given = np.asarray(infos.get("_action_mask", np.full(len(ends), "action_mask" in infos)))
    missing = ~given & ~ends if previous is None else np.zeros_like(given)
    if missing.any():
        raise InputError(
            f"action_masks is true, but environment {int(missing.nonzero()[0][0])} of this process gave no "
            "info['action_mask']: it must come with every reset and every step."
        )
    if given.any():
        values = np.stack([np.asarray(mask) for mask in infos["action_mask"][given]])
        if values.shape[1:] != (num_choices,):
            raise InputError(
                f"info['action_mask'] has the shape {values.shape[1:]}, but the actions need {(num_choices,)}: one entry "
                "for each choice, those of several choices one after the other."
            )
        masks[given] = values.astype(bool)
    nothing = ~masks.any(axis=1)
    masks[nothing & ends] = True
    if (nothing & ~ends).any():
        row = int((nothing & ~ends).nonzero()[0][0])
        raise TrainingError(f"info['action_mask'] of environment {row} of this process allows no action at all.")
    return masks


# --- vector environments that were not built by make_vector_env ---


def as_vector_env(envs: Any, *, seed: int = 0, first_row: int = 0) -> VectorEnv:
    """Adapt the user's vector environment, Gymnasium's or EnvPool's, for the collector. It cannot be replayed.

    Its first reset is seeded from (seed, first_row); EnvPool's seeds were fixed when the pool was made.
    """
    if is_pool(envs):
        return EnvPoolVectorEnv(envs)
    if not isinstance(envs, VectorEnv):
        raise InputError(
            f"env = {envs!r} is not a vector environment. Give a Gymnasium id, a function that makes one environment, a "
            "gymnasium.vector.VectorEnv, or EnvPool's envpool.make(..., env_type='gymnasium')."
        )
    autoreset_mode(envs)
    if envs.render_mode is not None:
        raise InputError(
            f"The vector environment was made with render_mode={envs.render_mode!r}, which slows training: leave it out."
        )
    return SeededVectorEnv(envs, start_seeds(seed, [first_row])[0])


class SeededVectorEnv(VectorWrapper):
    """Seeds the first reset; later ones continue with the environments' own random numbers."""

    replays = False

    def __init__(self, envs: VectorEnv, seed: int) -> None:
        super().__init__(envs)
        self._seed: int | None = seed

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed = self._seed if seed is None else seed
        self._seed = None
        return self.env.reset(seed=seed, options=options)
