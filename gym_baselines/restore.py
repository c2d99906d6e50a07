"""Saves the state of the environments in a checkpoint (where each row is in its episode), and restores it.

A running episode is restored by repeating its actions from its reset. An environment that cannot do this (EnvPool, the
user's own vector environment, or one that is not a function of its seed and actions) starts a new episode, and is
reported.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gym_baselines.collect import Collector
from gym_baselines.envs.vector import replay, replay_records, replays
from gym_baselines.normalize import RewardScale
from gym_baselines.record import Segment
from rlhf.errors import InputError, excerpt
from rlhf.runs.checkpoint import ANOTHER

Rows = dict[int, dict[str, Any]]
"""Global row index -> arrays and numbers of the row, by name."""


def row_states(collector: Collector, scale: RewardScale | None) -> Rows:
    """The state of each row of this process."""
    rows = collector.rows.tolist()
    records = replay_records(collector.envs, rows) if replays(collector.envs) else {}
    states: Rows = {}
    for place, row in enumerate(rows):
        state: dict[str, Any] = {
            "observation": collector.observation[place],
            "is_ghost": bool(collector.is_ghost[place]),
            "steps_done": int(collector.steps_done[place]),
            "return": float(collector.returns[place]),
            "length": int(collector.lengths[place]),
        }
        if collector.action_mask is not None:
            state["action_mask"] = collector.action_mask[place]
        if scale is not None:
            state["discounted"] = float(scale.discounted[place])
        state |= {f"replay/{name}": value for name, value in records.get(row, {}).items()}
        if collector.carried is not None:
            segment = collector.carried[place]
            state |= {f"carried/{name}": array for name, array in segment.arrays.items()}
        states[row] = state
    return states


def to_checkpoint(rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all rows as (tensors, JSON values)."""
    tensors, numbers = {}, {}
    for row, state in rows.items():
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                tensors[f"{row}/{name}"] = torch.from_numpy(np.ascontiguousarray(value))
            else:
                numbers[f"{row}/{name}"] = value
    return tensors, numbers


def from_checkpoint(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Rows:
    rows: Rows = {}
    for key, value in {**{name: tensor.numpy() for name, tensor in tensors.items()}, **numbers}.items():
        row, _, name = key.partition("/")
        rows.setdefault(int(row), {})[name] = value
    return rows


def check_rows(own: Rows, saved: Rows) -> None:
    """Raise InputError unless each row in `own`, the states of fresh environments, has a saved state of the same kind.

    What a replay needs is not compared: it shows in the observation that the replay ends with.
    """
    for row, state in own.items():
        found = {name: value for name, value in saved.get(row, {}).items() if not name.startswith("carried/")}
        for name in sorted(state.keys() | found.keys()):
            if not _alike(state.get(name), found.get(name), exactly=not name.startswith("replay/")):
                raise InputError(
                    f"The saved state of environment {row} has for {name} {_kind(found.get(name))}, these environments "
                    f"have {_kind(state.get(name))}. {ANOTHER}"
                )


def are_numbers(values: Any, count: int) -> bool:
    """Whether `values`, read from JSON, is a list of `count` finite numbers."""
    return isinstance(values, list) and len(values) == count and all(_is_finite(value) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _alike(own: Any, saved: Any, *, exactly: bool) -> bool:
    if isinstance(own, np.ndarray) and isinstance(saved, np.ndarray):
        return not exactly or (own.dtype == saved.dtype and own.shape == saved.shape)
    return type(own) is type(saved) and (not isinstance(saved, float) or math.isfinite(saved))


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else excerpt(value)


def restore_rows(collector: Collector, scale: RewardScale | None, rows: Rows) -> list[int]:
    """Restore this process's environments; returns the global indices of rows that had to start a new episode."""
    mine = [rows[row] for row in collector.rows.tolist()]
    collector.is_ghost = np.array([state["is_ghost"] for state in mine])
    collector.steps_done = torch.tensor([state["steps_done"] for state in mine])
    collector.returns = np.array([state["return"] for state in mine])
    collector.lengths = np.array([state["length"] for state in mine], dtype=np.int64)
    if "action_mask" in mine[0] and replays(collector.envs):
        collector.action_mask = np.stack([state["action_mask"] for state in mine])
    if scale is not None:
        scale.discounted = torch.tensor([state["discounted"] for state in mine], dtype=torch.float64)
    if "carried/mask" in mine[0]:
        collector.carried = [_segment(state) for state in mine]
    restarted = _replay(collector, mine)
    for place in restarted:
        _forget(collector, scale, place)
    return [int(collector.rows[place]) for place in restarted]


def _replay(collector: Collector, mine: list[dict[str, Any]]) -> list[int]:
    """Replay the episodes; returns the places (local indices) of the rows that could not be restored."""
    if not replays(collector.envs):
        return list(range(len(mine)))  # they were reset when the collector was made
    records = {row: _record(state) for row, state in zip(collector.rows.tolist(), mine, strict=True)}
    observation, _ = replay(collector.envs, records)
    wanted = np.stack([state["observation"] for state in mine])
    lost = [place for place in range(len(mine)) if not np.array_equal(observation[place], wanted[place])]
    for place in lost:
        row = int(collector.rows[place])
        records[row] = {"episode": records[row]["episode"] + 1, "actions": records[row]["actions"][:0], "resumed": []}
    if lost:
        observation, infos = replay(collector.envs, records)
        collector.action_mask = collector.allowed(infos, np.zeros(len(mine), dtype=bool), None)
    collector.observation = np.array(observation)
    return lost


def _forget(collector: Collector, scale: RewardScale | None, place: int) -> None:
    """Reset what was counted of a row's lost episode, since it does not belong to the new one."""
    collector.is_ghost[place] = False
    collector.returns[place] = 0.0
    collector.lengths[place] = 0
    if scale is not None:
        scale.discounted[place] = 0.0
    if collector.carried is not None:
        collector.carried[place] = collector.carried[place].split(0)[0]


def _record(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("replay/"): value for name, value in state.items() if name.startswith("replay/")}


def _segment(state: dict[str, Any]) -> Segment:
    arrays = {name.removeprefix("carried/"): array for name, array in state.items() if name.startswith("carried/")}
    return Segment(arrays, {})  # an unfinished episode has no final observation yet
