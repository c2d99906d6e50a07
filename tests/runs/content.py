"""Checkpoints whose content is a function of their step, and what fails on purpose."""

import torch

from rlhf.runs.directory import RunDirectory

CONFIG = {"learning_rate": 1e-5, "ppo": {"clip_range": 0.2}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Content that is a function of the step, so that a mixture of two checkpoints is recognised."""
    generator = torch.Generator().manual_seed(step)
    policy = {"head": torch.randn(3, 4, generator=generator), "bias": torch.randn(4, generator=generator).double()}
    return {"policy": policy, "optimizer": {"step/head": torch.tensor(float(step))}}


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
