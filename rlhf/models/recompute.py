"""Gradient checkpointing: the backward pass computes each layer again instead of keeping what is inside it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import InputError
from rlhf.models.policy import Policy


def recompute_layers(policy: Policy) -> None:
    """Let every layer of `policy` (of its critic, too) be computed again in the backward pass. Changes no result.

    The switch of transformers works in training mode alone, and the policy is always in eval mode, so it is not used.
    Raises InputError if the model has no layers of the kind that transformers can checkpoint.
    """
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"gradient_checkpointing: {type(policy.lm).__name__} has no layers that can be computed again. Set it to false."
        )
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, policy)


def _forward(forward: Callable[..., Any], policy: Policy, *inputs: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **keywords)
    contexts = partial(_same_adapter, policy)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **keywords)


def _same_adapter(policy: Policy) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward and of the second one, in the backward pass, when another adapter may be on."""
    if policy.adapters is None:
        return nullcontext(), nullcontext()
    return nullcontext(), policy.with_adapter(policy.adapters.active_name)
