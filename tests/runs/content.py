"""Checkpoints whose content is a function of their step, and what fails on purpose."""

import torch

from rlhf.runs.directory import RunDirectory
from rlhf.types import Shard

CONFIG = {"learning_rate": 1e-5, "ppo": {"clip_range": 0.2}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Content that is a function of the step, so that a mixture of two checkpoints is recognised."""
    generator = torch.Generator().manual_seed(step)
    policy = {"head": torch.randn(3, 4, generator=generator), "bias": torch.randn(4, generator=generator).double()}
    policy["gate"] = torch.randn(1, 4, generator=generator).bfloat16()
    policy["places"] = torch.randint(2**62, (5, 2), generator=generator)
    optimizer = {"step/head": torch.tensor(float(step)), "exp_avg/head": torch.randn(3, 4, generator=generator)}
    return {"policy": policy, "optimizer": optimizer}


def shares(step: int, rank: int, processes: int = 2) -> dict[str, dict[str, torch.Tensor | Shard]]:
    """The same tensors, of which each process has some rows (or none); those without rows has the main process."""
    return {
        group: {
            name: _share(tensor, rank, processes) if tensor.dim() else tensor
            for name, tensor in named.items()
            if tensor.dim() or rank == 0
        }
        for group, named in tensors(step).items()
    }


def _share(tensor: torch.Tensor, rank: int, processes: int) -> Shard:
    each = -(-len(tensor) // processes)
    return Shard(tensor[rank * each : (rank + 1) * each], min(rank * each, len(tensor)))


def state(step: int) -> dict:
    return {"kl_coef": 0.1 + 0.2 * step, "cursor": step, "algorithm": {"scores": [1 / 3, 1e-300, step]}}


def save(run: RunDirectory, step: int) -> None:
    run.save(step, tensors(step), state(step), config=CONFIG)


def assert_is_exactly(checkpoint, step: int) -> None:
    assert checkpoint.step == step and checkpoint.state == state(step) and checkpoint.config == CONFIG
    for group, named in tensors(step).items():
        loaded = checkpoint.tensors(group)
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[name], named[name]) and loaded[name].dtype == named[name].dtype for name in named)


def failing(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail
