"""Converts an optimizer's state to and from the contents of a checkpoint, keyed by parameter name."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlhf.errors import InputError

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
    return tensors, {"parameters": groups, "hyperparameters": hyperparameters, "scalars": scalars}


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
        InputError: Parameters, groups or shapes differ.
    """
    groups = _group_names(optimizer, named_parameters)
    flat = [name for group in groups for name in group]
    if [sorted(group) for group in groups] != [sorted(group) for group in state["parameters"]]:
        differing = sorted({*flat} ^ {name for group in state["parameters"] for name in group})
        raise InputError(
            f"The saved optimizer trains other parameters or groups them differently (in only one of the two: "
            f"{differing}). Resume with the model and trainable parts of the saved run."
        )
    index = {name: number for number, name in enumerate(flat)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in {**state["scalars"], **tensors}.items():
        key, _, name = full_name.partition("/")
        wanted = parameters[index[name]].shape
        if isinstance(value, Tensor) and value.dim() and value.shape != wanted:
            raise InputError(
                f"The saved {full_name} has shape {tuple(value.shape)}, the parameter {tuple(wanted)}. Resume with the "
                "model of the saved run."
            )
        entries.setdefault(index[name], {})[key] = (
            like(value, parameters[index[name]]) if isinstance(value, Tensor) else value
        )
    current = optimizer.state_dict()["param_groups"]
    for group, saved in zip(current, state["hyperparameters"], strict=True):
        kept = {*_SWITCHES, *keep}
        group.update({key: _like(group.get(key), value) for key, value in saved.items() if key not in kept})
    optimizer.load_state_dict({"state": entries, "param_groups": current})


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
