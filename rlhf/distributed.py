"""Processes and devices: the only file that uses accelerate. With one process, collectives return their input."""

import atexit
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, broadcast_object_list, gather_object
from torch import Tensor
from torch.nn import Module

from rlhf import lifeline
from rlhf.errors import InputError
from rlhf.layout import FullySharded, Layout, Replicated
from rlhf.settings import dotted
from rlhf.types import TrainingBatch


class Distributed:
    """One process's view of the group: rank, device, sums over processes, and the gradient step."""

    def __init__(
        self,
        *,
        cpu: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
        tracker: str | None = None,
        tracker_dir: str | None = None,
        collective_timeout_s: float = 1800.0,
    ) -> None:
        """cpu: do not use a GPU. precision: "bfloat16" autocasts the forward over float32 master weights. tracker: a
        name that Accelerate knows. collective_timeout_s: how long one process waits for the others, see
        `TrainerConfig`. Raises InputError if the launch asks for a kind of sharding or a number of processes that this run
        would not have, the tracker is unknown or not installed, or this process uses another precision.
        """
        sharded = _asks_for_shards()
        _check_tracker(tracker)
        grouped = dist.is_initialized()
        try:
            self.accelerator = Accelerator(
                cpu=cpu or not torch.cuda.is_available(),  # draws need float64, which Apple's GPUs lack
                mixed_precision="bf16" if precision == "bfloat16" else "no",
                log_with=tracker,
                project_dir=tracker_dir,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_s))],
            )
        except ValueError as error:
            if "already been initialized" not in str(error):
                raise
            raise InputError(
                f"precision={precision!r}: this process already uses another precision, which Accelerate cannot change. "
                "Start a new process."
            ) from error
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.strategy = self.accelerator.distributed_type.value
        self.precision = precision
        _check_world_size(self.world_size)
        self.notes: list[str] = []
        """Notes on how the run was launched, one line each, for the run to print."""
        self._plain = self.world_size == 1 and precision == "float32"
        self.layout: Layout = FullySharded(self.accelerator) if sharded else Replicated(self.accelerator)
        if self.world_size > 1:
            self.notes = _note_on_timeout(grouped, collective_timeout_s)
            atexit.register(_leave_group)
            lifeline.start(self.rank, self.world_size, lambda value: broadcast_object_list([value])[0])

    def unwrap(self, policy: Module) -> Module:
        """The module itself, from what `layout.train` returned."""
        return policy if self._plain else self.accelerator.unwrap_model(policy)

    def autocast(self) -> Any:
        """Context of a forward outside of training, with the arithmetic of training."""
        return nullcontext() if self._plain or self.layout.in_step else self.accelerator.autocast()

    def all_sum(self, values: Tensor) -> Tensor:
        """`values` added over all processes."""
        if self.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.device), reduction="sum").to(
            values.device
        )  # NCCL has no CPU sums

    def share(self, count: int) -> range:
        """This process's contiguous share of 0 .. count - 1; shares differ by at most one."""
        bounds = [count * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        return range(*bounds)

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one after the other; later dimensions may differ and are padded with 0 at the end."""
        if self.world_size == 1:
            return tensor
        if tensor.dtype == torch.bool:
            return self.gather_rows(tensor.to(torch.uint8)).bool()
        shape = torch.tensor(tensor.shape, device=tensor.device)
        shapes = [torch.empty_like(shape) for _ in range(self.world_size)]
        dist.all_gather(shapes, shape)
        widest = torch.stack(shapes).amax(0).tolist()
        padded = tensor.new_zeros(widest)
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        pieces = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[: int(shape[0])] for piece, shape in zip(pieces, shapes, strict=True)])

    def gather_batch(self, batch: TrainingBatch) -> TrainingBatch:
        """The global batch, in the order of `row_index`, on every process."""
        if self.world_size == 1:
            return batch
        batch = batch.map_rows(self.gather_rows)
        return batch.select(batch.row_index.argsort())

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The elements of all processes' lists, in the order of ranks."""
        return items if self.world_size == 1 else gather_object(items)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def start_tracking(self, run_name: str, config: Mapping[str, Any]) -> None:
        """config: settings. Nested ones get dotted names; trackers take only numbers and text."""
        if self.accelerator.log_with:
            plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in dotted(config)}
            self.accelerator.init_trackers(run_name, config=plain)

    def track(self, metrics: Mapping[str, float], step: int) -> None:
        self.accelerator.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the trackers, not the process group: these processes may still evaluate, or train something else."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron"}
"""Environment variable that `accelerate launch` sets -> the kind of sharding that it asks for, and rlhf does not have."""


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


def _asks_for_shards() -> bool:
    """Whether the launch asks for FSDP2. InputError if it asks for sharding that would be ignored or be another one."""
    for variable, kind in REFUSED.items():
        if _is_set(variable):
            raise InputError(
                f"accelerate launch asks for {kind}, which rlhf does not support. Launch with --config_file "
                "recipes/accelerate/fsdp2.yaml to shard the model, or ddp.yaml for one copy per process."
            )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    for variable, wanted in {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}.items():
        found = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else "false")
        if found.lower() != wanted:
            raise InputError(
                f"accelerate launch asks for FSDP with {variable.lower()}: {found}, but rlhf supports only {wanted}. "
                "Launch with --config_file recipes/accelerate/fsdp2.yaml."
            )
    return True


def _check_tracker(tracker: str | None) -> None:
    if tracker is None:
        return
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    if tracker not in known:
        raise InputError(f"tracker={tracker!r} is unknown. Choose one of {', '.join(known)}, or null for none.")
    if tracker not in map(str, get_available_trackers()):
        raise InputError(f"tracker={tracker!r} is not installed: pip install {tracker}, or set tracker to null.")


def _check_world_size(world_size: int) -> None:
    """Refuses a run with fewer processes than it was launched for: all batch sizes would still be met, but slowly."""
    environment = os.environ
    wanted = int(environment.get("WORLD_SIZE", world_size))
    # `accelerate launch --cpu --num_processes 2` starts one process, and still sets the address of the others.
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    if world_size < wanted or (world_size == 1 and launched and "MASTER_ADDR" in environment):
        raise InputError(
            f"The launch asked for {wanted if wanted > 1 else 'several'} processes and has started {world_size}: several "
            "on a CPU need --config_file recipes/accelerate/cpu2.yaml. For one process, set --num_processes to 1."
        )


_timeout_s: float | None = None
"""The `collective_timeout_s` with which this module made the process group."""


def _note_on_timeout(grouped: bool, timeout_s: float) -> list[str]:
    """A note if the process group existed, made with another timeout: a group keeps its own."""
    global _timeout_s
    if not grouped:
        _timeout_s = timeout_s
    if _timeout_s == timeout_s:
        return []
    return [f"note: collective_timeout_s={timeout_s:g} has no effect, since the processes were connected before"]


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
