"""Converts an optimizer's state to and from the contents of a checkpoint, keyed by parameter name."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlhf.errors import InputError, excerpt
from rlhf.training.weights import kind

_SWITCHES = ("fused", "foreach", "capturable", "differentiable")  # how torch computes a step, not its result

NamedParameters = Iterable[tuple[str, Tensor]]


def optimizer_tensors(
    optimizer: Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as ("exp_avg/<parameter name>" -> tensor, the rest as JSON): no pickle, no indices.

    named_parameters: `model.named_parameters()`, with every parameter that the optimizer holds.
    """
    groups = _group_names(optimizer, named_parameters)
    flat = [name for group in groups for name in group]
    state_dict = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state_dict["state"].items():
        for key, value in entries.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
            target[f"{key}/{flat[index]}"] = value
    hyperparameters = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in state_dict["param_groups"]
    ]
    kinds = {name: kind(tensor) for name, tensor in tensors.items()}
    return tensors, {"parameters": groups, "hyperparameters": hyperparameters, "scalars": scalars, "tensors": kinds}


def load_optimizer_tensors(
    optimizer: Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: Collection[str] = (),
    like: Callable[[Tensor, Tensor], Tensor] = lambda whole, _: whole.clone(),
) -> None:
    """Gives `optimizer` the state that `optimizer_tensors` returned, bit for bit.

    Args:
        named_parameters: `model.named_parameters()`. Parameters are matched by name; their order does not matter.
        keep: Hyper-parameters (such as "lr") that keep the optimizer's present value. Those that only choose torch's
            implementation (`fused`, ...) always do.
        like: like(whole, parameter) spreads a complete tensor over the processes as the parameter is.

    Raises:
        InputError: See `check_optimizer_tensors`. The optimizer is then as before.
    """
    named_parameters = list(named_parameters)
    check_optimizer_tensors(optimizer, named_parameters, tensors, state)
    index = {name: number for number, name in enumerate(_flat_names(optimizer, named_parameters))}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in {**state["scalars"], **tensors}.items():
        key, _, name = full_name.partition("/")
        spread = like(value, parameters[index[name]]) if isinstance(value, Tensor) else value
        entries.setdefault(index[name], {})[key] = spread
    current = optimizer.state_dict()["param_groups"]
    for group, saved in zip(current, state["hyperparameters"], strict=True):
        kept = {*_SWITCHES, *keep}
        group.update({key: _like(group.get(key), value) for key, value in saved.items() if key not in kept})
    optimizer.load_state_dict({"state": entries, "param_groups": current})


def check_optimizer_tensors(
    optimizer: Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Raises InputError unless `optimizer_tensors` gave these for an optimizer like this one.

    The parameters and their groups must be equal; the tensors those that were saved, in number, type and shape, and fit
    the parameters; the hyper-parameters of the types that the optimizer has. torch itself would convert or fail later.
    """
    named_parameters = list(named_parameters)
    groups = _group_names(optimizer, named_parameters)
    _check_layout(state, groups)
    parameters = dict(named_parameters)
    trained = set(_flat_names(optimizer, named_parameters))
    found = {name: kind(tensor) for name, tensor in tensors.items()}
    saved = state.get("tensors", found)  # earlier runs have no list of them
    if different := [name for name in sorted(found.keys() | saved.keys()) if found.get(name) != saved.get(name)]:
        first = different[0]
        raise InputError(
            f"optimizer.safetensors differs from what was saved: {first} is {found.get(first, 'absent')}, it was "
            f"{saved.get(first, 'absent')}. Resume from another checkpoint."
        )
    for full_name, value in {**state["scalars"], **tensors}.items():
        name = full_name.partition("/")[2]
        if name not in trained:
            raise InputError(f"The saved {full_name} belongs to no trained parameter. Resume from another checkpoint.")
        wanted = parameters[name]
        if isinstance(value, Tensor) and value.dim() and value.shape != wanted.shape:
            raise InputError(
                f"The saved {full_name} has shape {tuple(value.shape)}, the parameter {tuple(wanted.shape)}. Resume with "
                "the model of the saved run."
            )
        if isinstance(value, Tensor) and value.dtype != wanted.dtype and (value.dim() or not value.is_floating_point()):
            raise InputError(
                f"The saved {full_name} is {kind(value)}, the parameter {kind(wanted)}. Resume with the precision of the "
                "saved run, or from another checkpoint."
            )
    for group, saved_group in zip(optimizer.param_groups, state["hyperparameters"], strict=True):
        for key, value in saved_group.items():
            if key not in _SWITCHES and not (key in group and _alike(_plain(group[key]), value)):
                raise InputError(
                    f"state.json: the optimizer's {key} is {excerpt(value)}, which does not fit "
                    f"{excerpt(_plain(group.get(key)))}. Resume from another checkpoint."
                )


def _check_layout(state: Mapping[str, Any], groups: list[list[str]]) -> None:
    kinds = {"parameters": list, "hyperparameters": list, "scalars": dict, "tensors": dict}
    for name, wanted in kinds.items():
        if not isinstance(state.get(name, {} if name == "tensors" else None), wanted):
            raise InputError(
                f"state.json: the optimizer's {name} is {excerpt(state.get(name))}, not of type {wanted.__name__}. Resume "
                "from another checkpoint."
            )
    saved = state["parameters"]
    if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in saved) or [
        sorted(group) for group in groups
    ] != [sorted(group) for group in saved]:
        names = {name for group in saved if isinstance(group, list) for name in group if isinstance(name, str)}
        raise InputError(
            f"The saved optimizer trains other parameters or groups them differently (in only one of the two: "
            f"{sorted({name for group in groups for name in group} ^ names)}). Resume with the model and trainable parts "
            "of the saved run."
        )
    hyperparameters = state["hyperparameters"]
    if len(hyperparameters) != len(groups) or not all(isinstance(group, dict) for group in hyperparameters):
        raise InputError(
            f"state.json: the optimizer's hyperparameters {excerpt(hyperparameters)} are not one dictionary for each of "
            f"{len(groups)} groups. Resume from another checkpoint."
        )


def _alike(current: Any, saved: Any) -> bool:
    """Whether a hyper-parameter read from JSON is of the type that the optimizer has: a finite number, a list of these."""
    if isinstance(current, list) and isinstance(saved, list):
        return len(current) == len(saved) and all(map(_alike, current, saved))
    if isinstance(current, bool | str | None) or isinstance(saved, bool | str | None):
        return type(current) is type(saved)
    return isinstance(current, int | float) and isinstance(saved, int | float) and math.isfinite(saved)


def _flat_names(optimizer: Optimizer, named_parameters: NamedParameters) -> list[str]:
    return [name for group in _group_names(optimizer, named_parameters) for name in group]


def _group_names(optimizer: Optimizer, named_parameters: NamedParameters) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in named_parameters}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(current: Any, saved: Any) -> Any:
    """`saved`, as read from JSON, converted to the type that the optimizer uses now (a tensor, a tuple)."""
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(saved, list) else saved
