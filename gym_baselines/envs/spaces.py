"""Spaces: which are supported, which action distribution each needs, and their JSON form in a saved agent."""

from math import isfinite, prod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from rlhf.core.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from rlhf.errors import InputError

_SMALLEST_IMAGE = 36  # fewest pixels per side with which the Atari network's three convolutions work
_MOST_CHANNELS = 16  # a stack of four colour pictures has 12


def check_spaces_supported(
    observations: gym.Space, actions: gym.Space, name: str = "the environment", *, squash: bool = False
) -> None:
    """Raise InputError, naming the space, if no policy supports it. squash: actions are squashed into their bounds."""
    _check_observations(observations, name)
    if isinstance(actions, Box):
        _check_box_actions(actions, name, squash=squash)
        return
    if not isinstance(actions, Discrete | MultiDiscrete | MultiBinary):
        raise InputError(
            f"{name} has the action space {actions}, but only Discrete, MultiDiscrete, MultiBinary and Box are supported. "
            "Wrap the environment in a gymnasium.ActionWrapper that offers one of them."
        )
    if squash:
        raise InputError(
            f"squash = true is for Box actions with bounds, but {name} has the action space {actions}: set squash to false."
        )


def _check_observations(observations: gym.Space, name: str) -> None:
    if isinstance(observations, Discrete):
        return
    if not isinstance(observations, Box):
        raise InputError(
            f"{name} has the observation space {observations}, but only Box and Discrete are supported. Set flatten to "
            "true (Gymnasium's FlattenObservation), which turns any space of a fixed size into a Box."
        )
    if prod(observations.shape) == 0:
        raise InputError(f"{name} has the observation space {observations}, which holds no number to observe.")


def _check_box_actions(actions: Box, name: str, *, squash: bool) -> None:
    if not np.issubdtype(actions.dtype, np.floating):
        raise InputError(
            f"{name} has the action space {actions} of type {actions.dtype}, but a Box of actions needs real numbers: wrap "
            "it in a gymnasium.ActionWrapper with a Discrete, MultiDiscrete or float32 Box space."
        )
    if prod(actions.shape) == 0:
        raise InputError(f"{name} has the action space {actions}, which holds no number to choose.")
    if not (actions.low < actions.high).all():  # false for NaN, too
        raise InputError(
            f"{name} has the action space {actions}, whose low must lie below its high everywhere: correct its bounds, or "
            "leave fixed numbers out with a gymnasium.ActionWrapper."
        )
    if squash and not actions.is_bounded():
        raise InputError(
            f"squash = true needs actions with finite bounds, but {name} has {actions}: set squash to false, or bound the "
            "actions with gymnasium.wrappers.RescaleAction or a TransformAction."
        )


def action_family(actions: gym.Space, *, squash: bool = False) -> Distribution:
    """The distribution for a supported action space. squash: for a Box, a Gaussian squashed into its bounds."""
    if isinstance(actions, Discrete):
        return Categorical(int(actions.n))
    if isinstance(actions, MultiDiscrete):
        return MultiCategorical(tuple(int(n) for n in actions.nvec.flat))
    if isinstance(actions, MultiBinary):
        return MultiCategorical((2,) * prod(actions.shape))
    assert isinstance(actions, Box)
    size = prod(actions.shape)
    if not squash:
        return Gaussian(size)
    low, high = actions.low.astype(np.float64).ravel(), actions.high.astype(np.float64).ravel()
    scale, shift = (high - low) / 2, (high + low) / 2
    return SquashedGaussian(size, scale=tuple(scale.tolist()), shift=tuple(shift.tolist()))


def image_channels(observations: gym.Space) -> int | None:
    """The channel dimension, 0 or 2, of images for the Atari network (bytes, 36 x 36 or more); else None."""
    if not isinstance(observations, Box) or observations.dtype != np.uint8 or len(observations.shape) != 3:
        return None
    for place, (height, width) in ((0, observations.shape[1:]), (2, observations.shape[:2])):
        if observations.shape[place] <= _MOST_CHANNELS and min(height, width) >= _SMALLEST_IMAGE:
            return place
    return None


def are_alike(one: gym.Space, other: gym.Space) -> bool:
    """Whether a policy for one space can be used with the other; bounds and dtypes may differ."""
    if type(one) is not type(other) or one.shape != other.shape:
        return False
    facts, others = space_to_json(one), space_to_json(other)
    return all(facts[name] == others[name] for name in ("n", "nvec", "start") if name in facts)


# --- JSON ---


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """JSON values from which `space_from_json` makes an equal space. A uniform bound is written once."""
    if isinstance(space, Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if not isinstance(space, Box):
        raise InputError(f"The space {space} cannot be saved; only Box, Discrete, MultiDiscrete and MultiBinary can.")
    bounds = {name: _bounds_to_json(getattr(space, name)) for name in ("low", "high")}
    return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}


def space_from_json(facts: dict[str, Any]) -> gym.Space:
    """The space that `space_to_json` described. Raises ValueError, KeyError or TypeError if `facts` describe none."""
    kind = facts["type"]
    if kind not in ("Box", "Discrete", "MultiBinary", "MultiDiscrete"):
        raise ValueError(f"unknown space {kind!r}")
    if kind == "MultiBinary":
        shape = facts["shape"]
        return MultiBinary(shape[0] if len(shape) == 1 else shape)
    dtype: Any = np.dtype(facts["dtype"])
    if kind == "Discrete":
        return Discrete(facts["n"], start=facts["start"], dtype=dtype.type)
    if kind == "MultiDiscrete":
        return MultiDiscrete(np.array(facts["nvec"]), dtype=dtype.type, start=np.array(facts["start"]))
    low, high = (_bounds_from_json(facts[name], facts["shape"], dtype) for name in ("low", "high"))
    return Box(low, high, dtype=dtype.type)


def _bounds_to_json(bounds: np.ndarray) -> list[Any]:
    """The bounds as a flat list; infinity as text, since JSON has no number for it."""
    numbers = bounds.ravel()[:1] if (bounds == bounds.flat[0]).all() else bounds.ravel()
    return [number if isfinite(number) else str(number) for number in numbers.tolist()]


def _bounds_from_json(numbers: list[Any], shape: list[int], dtype: np.dtype) -> np.ndarray:
    flat = np.array([float(number) if isinstance(number, str) else number for number in numbers], dtype=dtype)
    return np.full(shape, flat[0], dtype) if len(flat) == 1 else flat.reshape(shape)
