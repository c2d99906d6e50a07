"""Vector environments: what their steps and infos mean, EnvPool's and the user's own among them."""

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
    """How the vector environment resets; InputError unless the collector knows what its steps then mean."""
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
    """Whether running episodes can be restored by replaying them: so for what make_vector_env builds, EnvPool apart."""
    return bool(getattr(envs, "replays", False))


def replay_records(envs: VectorEnv, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What `replay` needs to bring each row back to where it is now; see SeededResets.replay_record."""
    return dict(zip(rows, envs.call("replay_record"), strict=True))  # type: ignore[attr-defined]


def replay(envs: VectorEnv, records: Mapping[int, Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Restore every row from its record and return the observations and infos of the last steps made.

    The caller should compare the observations with those it saved: an environment that is not a function of its seed
    and its actions gives others.
    """
    return envs.reset(options={"replay": records})


# --- infos ---


def reports_games(envs: VectorEnv) -> bool:
    """Whether infos hold the results of whole games, of which episodes are only parts (Atari's lives)."""
    return bool(getattr(envs, "reports_games", False))


def finished_games(infos: Mapping[str, Any], ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole games that a step ended: (rows,) which, their undiscounted returns and their lengths, 0 elsewhere.

    ends: (rows,) which episodes ended; a lost life ends an episode but no game. In SAME_STEP the result of a game is in
    infos["final_info"], in the other modes in infos itself.
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
    """(rows, num_choices) bool: the actions that are allowed in the observations that came with these infos.

    ends: (rows,) whose observation is the last of its episode. No action follows it, so if none is allowed there, or no
    mask is given, all are. previous: masks of the rows that these infos say nothing of (those a partial reset left alone).
    Raises InputError where a mask is missing or of another size, TrainingError where no action is allowed.
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


# --- vector environments that are not made from single ones ---


def as_vector_env(envs: Any, *, seed: int = 0, first_row: int = 0) -> VectorEnv:
    """A vector environment that the user made, Gymnasium's or EnvPool's, as the collector wants it. It does not replay.

    Its first reset is seeded from (seed, first_row); EnvPool's seeds were fixed when it was made.
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
    """The first reset is seeded; later ones go on with the environments' own random numbers."""

    replays = False

    def __init__(self, envs: VectorEnv, seed: int) -> None:
        super().__init__(envs)
        self._seed: int | None = seed

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed, self._seed = self._seed if seed is None else seed, None
        return self.env.reset(seed=seed, options=options)
