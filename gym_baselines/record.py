"""Buffers for the steps of a rollout, time first, before the policy scores them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

_ARRAYS = (
    *("observations", "actions", "logprobs", "rewards", "mask", "terminated", "ends", "finished", "action_masks"),
    "versions",
)

FinalObservation = tuple[int, int, np.ndarray]
"""(time, row, observation)"""


class Segment(NamedTuple):
    """Consecutive steps of one row: arrays (steps, ...) by name, and final observations by step."""

    arrays: dict[str, np.ndarray]
    finals: dict[int, np.ndarray]

    def __len__(self) -> int:  # the number of steps, not of tuple fields
        return len(self.arrays["mask"])

    def then(self, other: "Segment") -> "Segment":
        arrays = {name: np.concatenate([array, other.arrays[name]]) for name, array in self.arrays.items()}
        return Segment(arrays, self.finals | {len(self) + t: final for t, final in other.finals.items()})

    def split(self, at: int) -> tuple["Segment", "Segment"]:
        first = {t: final for t, final in self.finals.items() if t < at}
        rest = {t - at: final for t, final in self.finals.items() if t >= at}
        return (
            Segment({name: array[:at] for name, array in self.arrays.items()}, first),
            Segment({name: array[at:] for name, array in self.arrays.items()}, rest),
        )


@dataclass
class Record:
    """Time-major buffers of one rollout, (time, rows, ...), so that each step is written contiguously."""

    observations: np.ndarray
    actions: np.ndarray
    """As the policy drew them: unclipped, counted from 0."""
    logprobs: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    """False at a ghost step."""
    terminated: np.ndarray
    ends: np.ndarray
    finished: np.ndarray
    """(time, rows, 2): return and length of the episode that ended at this step; 0 if none did."""
    action_masks: np.ndarray | None = None
    versions: np.ndarray | None = None
    """How many updates the policy had had when it made each step. None: in all steps as many as now."""
    final_observations: list[FinalObservation] = field(default_factory=list)

    @classmethod
    def empty(cls, num_steps: int, envs: VectorEnv, policy: Any, *, with_masks: bool) -> "Record":
        shape = (num_steps, envs.num_envs)
        observations = envs.single_observation_space
        family = policy.family
        return cls(
            observations=np.empty((*shape, *observations.shape), dtype=observations.dtype),  # type: ignore[misc]
            actions=np.empty((*shape, *family.action_shape), dtype=np.int64 if family.is_discrete else np.float64),
            logprobs=np.empty(shape),
            rewards=np.empty(shape),
            mask=np.empty(shape, dtype=bool),
            terminated=np.empty(shape, dtype=bool),
            ends=np.empty(shape, dtype=bool),
            finished=np.zeros((*shape, 2)),
            action_masks=np.empty((*shape, family.num_params), dtype=bool) if with_masks else None,
        )

    def segment(self, row: int) -> Segment:
        arrays = {name: getattr(self, name)[:, row] for name in _ARRAYS if getattr(self, name) is not None}
        return Segment(arrays, {t: final for t, r, final in self.final_observations if r == row})

    def split_whole_episodes(self, carried: list[Segment] | None) -> tuple["Record", list[Segment]]:
        """Split into the finished episodes, from their first step on, and each row's steps of an unfinished one.

        carried: the unfinished steps of the previous call. Rows are padded with masked steps to the longest.
        """
        whole, rest = [], []
        for row in range(self.mask.shape[1]):
            steps = self.segment(row) if carried is None else carried[row].then(self.segment(row))
            ends = np.flatnonzero(steps.arrays["ends"])
            done, left = steps.split(int(ends[-1]) + 1 if len(ends) else 0)
            whole.append(done)
            rest.append(left)
        longest = max(1, *(len(segment) for segment in whole))
        stacked = {
            name: np.stack([_filled(segment.arrays[name], longest) for segment in whole], axis=1)
            for name in whole[0].arrays
        }
        finals = [(t, row, final) for row, segment in enumerate(whole) for t, final in segment.finals.items()]
        return Record(**stacked, final_observations=finals), rest


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    filled = np.zeros((length, *array.shape[1:]), dtype=array.dtype)
    filled[: len(array)] = array
    return filled
