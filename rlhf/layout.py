"""Where the weights live: whole in every process (one process, DDP), or in shards over all of them (FSDP2).

A layout makes the model and optimizer that are trained, exchanges gradients, gathers weights to sample from, and gives
whole tensors to checkpoints and exports. Nothing else knows how weights are stored.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from rlhf.errors import InputError, TrainingError
from rlhf.types import Shard


class Layout(Protocol):
    """How a model is spread over the processes."""

    name: str

    def train(self, policy: Module, make_optimizer: Callable[[Module], Optimizer]) -> tuple[Module, Optimizer]:
        """The module to call in training, with equal parameters on all processes, and its optimizer."""
        ...

    def freeze(self, module: Module) -> None:
        """Spread a module that is not trained."""
        ...

    def inference(self, *modules: Module, gather: bool) -> AbstractContextManager[None]:
        """Context of forwards without gradients. With `gather`, every process holds all weights inside it and makes as
        many forwards as it likes; without, all processes must make equally many."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether all processes must make equally many forwards of an ungathered module."""
        ...

    def accumulate(self, model: Module, *, last: bool) -> AbstractContextManager[None]:
        """Context of a microbatch; the last one of a minibatch exchanges gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this process's share of a sum over all processes."""
        ...

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The complete tensors, on the main process; an empty mapping on others. All processes call it."""
        ...

    def stored(self, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """What this process writes of the tensors into a checkpoint: tensors or `Shard`s. All processes call it."""
        ...

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A complete tensor, spread as `parameter` is."""
        ...


def gradient_norm(parameters: Iterable[Parameter]) -> Tensor:
    """The norm of the whole gradient; 0 if there is none. All processes call it, and get the same number."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_gradient(parameters: Iterable[Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradient, whose norm is `norm`, down to at most `max_norm`."""
    clip_grads_with_norm_(parameters, max_norm, norm)


class Replicated:
    """Every process holds all weights: one process, or data parallelism through Accelerate."""

    in_step = False

    def __init__(self, accelerator: Any) -> None:
        """accelerator: an `accelerate.Accelerator`."""
        self.accelerator = accelerator
        self.world_size = accelerator.num_processes
        self.name = "one process" if self.world_size == 1 else "DDP"
        self._plain = self.world_size == 1 and accelerator.mixed_precision == "no"

    def train(self, policy: Module, make_optimizer: Callable[[Module], Optimizer]) -> tuple[Module, Optimizer]:
        optimizer = make_optimizer(policy)
        return (policy, optimizer) if self._plain else self.accelerator.prepare(policy, optimizer)

    def freeze(self, module: Module) -> None: ...

    def inference(self, *modules: Module, gather: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def accumulate(self, model: Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last or self.world_size == 1 else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        if self._plain:
            loss.backward()
        else:  # data parallelism averages gradients, hence the factor
            self.accelerator.backward(loss * self.world_size)

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(named)

    def stored(self, named: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(named)

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        return tensor


class FullySharded:
    """Every process holds a share of each tensor (FSDP2): weights, gradients and moments take 1 / processes of the memory.

    Each layer is a unit, whose weights are gathered when it computes and freed afterwards; embeddings, head and the rest
    are gathered together. Heads that compute in float32 are units of their own, since a unit has one precision.
    """

    name = "FSDP2"
    in_step = True
    whole_up_to = 2**32
    """Bytes of a group of tensors up to which a checkpoint holds it in one file (4 GB)."""

    def __init__(self, accelerator: Any) -> None:
        """accelerator: an `accelerate.Accelerator`, for the device, the processes and the precision."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if not torch.distributed.is_initialized():
            raise InputError(
                "FSDP2 needs a group of processes, also for one: start the run with accelerate launch --config_file "
                "recipes/accelerate/fsdp2.yaml."
            )
        # It warns of in-place changes of outputs that are views; nothing here makes any.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.is_main = accelerator.is_main_process
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.mesh = init_device_mesh(accelerator.device.type, (self.world_size,))
        self.exact = MixedPrecisionPolicy()
        self.fast = self.exact
        if accelerator.mixed_precision == "bf16":
            self.fast = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def train(self, policy: Module, make_optimizer: Callable[[Module], Optimizer]) -> tuple[Module, Optimizer]:
        from torch.distributed.fsdp import register_fsdp_forward_method

        self._shard(policy, self.fast)
        register_fsdp_forward_method(policy, "decode")
        return policy, make_optimizer(policy)  # made of the shards: it must not see the whole tensors

    def freeze(self, module: Module) -> None:
        self._shard(module, self.exact)

    def _shard(self, module: Module, precision: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        layers, heads = _units(module)
        if not layers:
            raise InputError(
                f"{self.name}: {type(module).__name__} has no layers that transformers marks as such, so that the whole "
                "model would be gathered at once. Use --config_file recipes/accelerate/ddp.yaml."
            )
        for head in heads:
            fully_shard(head, mesh=self.mesh, mp_policy=self.exact)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=precision)
        fully_shard(module, mesh=self.mesh, mp_policy=precision)
        self._prove(module)

    def _prove(self, module: Module) -> None:
        """Raise TrainingError unless every parameter is in shards, in more than one unit."""
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        units = sum(isinstance(part, FSDPModule) for part in module.modules())
        whole = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
        if units < 2 or whole:
            raise TrainingError(
                f"{self.name} was asked for, but {type(module).__name__} has {units} unit(s), and {len(whole)} tensors are "
                f"not in shards ({', '.join(whole[:3])}). Use --config_file recipes/accelerate/ddp.yaml, and report the "
                "model."
            )

    @contextmanager
    def inference(self, *modules: Module, gather: bool) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        units = [(root, part) for root in modules for part in root.modules() if isinstance(part, FSDPModule)]
        if gather:
            for _, unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
        try:
            yield
        finally:
            for root, unit in units:
                if gather:
                    unit.set_reshard_after_forward(unit is not root, recurse=False)
                unit.reshard()  # also after forwards alone: the root keeps its weights, for a backward that does not come

    def accumulate(self, model: Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # exchanged each time: whole gradients would take as much memory as the whole model

    def backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # the exchange averages gradients

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, tensor in named.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.is_main:
                result[name] = full.cpu()
            del full  # before the next one is gathered
        return result

    def stored(self, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """Small groups whole, gathered one tensor at a time; above `whole_up_to` bytes each process its own rows."""
        if sum(tensor.numel() * tensor.element_size() for tensor in named.values()) <= self.whole_up_to:
            return self.whole(named)
        pieces = {name: self._rows(tensor) for name, tensor in named.items()}
        return {name: piece for name, piece in pieces.items() if piece is not None}

    def _rows(self, tensor: Tensor) -> Any:
        """This process's rows of a tensor; a tensor that is not spread goes to the main process."""
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            return tensor if self.is_main else None
        each = -(-tensor.shape[0] // self.world_size)  # as torch.chunk divides them
        return Shard(tensor.to_local(), min(self.rank * each, tensor.shape[0]))

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
            return tensor
        placed = tensor.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _units(module: Module) -> tuple[list[Module], list[Module]]:
    """The layers of the transformers models in `module`, and the heads that compute in float32."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    parts = list(module.modules())
    layers: list[Module] = [part for part in parts if isinstance(part, GradientCheckpointingLayer)]
    return layers, [part for part in parts if getattr(part, "computes_in_float32", False)]
