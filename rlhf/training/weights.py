"""A module's weights by name, for checkpoints, and their fingerprint, to tell models apart."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rlhf.errors import InputError


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once (tied weights have one name)."""
    return {name: p.detach() for name, p in module.named_parameters()} | _buffers(module)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, for checkpoints: every parameter with gradients, and every persistent buffer."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad} | _buffers(module)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._buffers.keys() - part._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def kind(tensor: Tensor | None) -> str:
    """Type and shape as text, such as "float32 (2, 3)"."""
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_named_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError unless a checkpoint's tensors have the names, shapes and types of the module's."""
    own = trained_tensors(module)
    different = [n for n in sorted(own.keys() | tensors.keys()) if kind(own.get(n)) != kind(tensors.get(n))]
    if different:
        first = different[0]
        raise InputError(
            f"The checkpoint is of another model: {', '.join(different[:3])} differ(s) ({first} is "
            f"{kind(tensors.get(first))} in policy.safetensors, {kind(own.get(first))} in the policy). "
            "Resume with the policy that the run was started with, or start a new run in another output_dir."
        )


def load_named_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], like: Callable[[Tensor, Tensor], Tensor] = lambda whole, _: whole
) -> None:
    """Copies a checkpoint's tensors into the module. Raises InputError, and changes nothing, if they do not fit it.

    like: like(whole, own) spreads a complete tensor over the processes as its own one is.
    """
    check_named_tensors(module, tensors)
    with torch.no_grad():
        for name, tensor in trained_tensors(module).items():
            tensor.copy_(like(tensors[name], tensor))


def fingerprint(module: nn.Module, of: Callable[[nn.Parameter], bool] = lambda parameter: True) -> str:
    """A short text that changes when a weight changes or two weights swap, to notice another model on resume.

    of: which parameters to look at; default: all.

    It sums the weights' bits, each times a number for its position, modulo 2**64: exact, so equal on every device.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for parameter in filter(of, module.parameters()):
        bits = parameter.detach().flatten().view(integers[parameter.element_size()])
        for start in range(0, len(bits), 2**24):
            part = bits[start : start + 2**24].long()
            place = torch.arange(start, start + len(part), device=part.device) + 1
            total = (total * 31 + int((part * (place * 0x9E3779B97F4A7C1 + 1)).sum())) % 2**64
    return f"{total:016x}"
