"""Hidden states of a transformers model at the places where tokens are predicted and states are valued."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import InputError


def states_before(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """The last hidden states at `places` (rows, time) of right-padded `ids` (rows, width): (rows, time, features)."""
    return at(model.base_model(input_ids=ids, use_cache=False).last_hidden_state, places)


def at(tensor: Tensor, places: Tensor) -> Tensor:
    """`tensor` (rows, width, features) at `places` (rows, time): (rows, time, features)."""
    return tensor.gather(1, places.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))


@dataclass(frozen=True)
class Anatomy:
    """What a causal LM computes besides hidden states, found by running it on two tokens."""

    width: int
    """Features of the last hidden states; may differ from the configuration's hidden_size."""
    plain_head: bool
    """Whether the logits are just the output embedding of the last hidden states, nothing before or after it."""


@torch.no_grad()
def anatomy_of(lm: PreTrainedModel) -> Anatomy:
    """Run `lm` on two tokens and look. The logits that its head gives are replaced by a ramp from -100 to 100, so that
    whatever the model does to logits (soft-capping, scaling) shows, whatever their size.

    Raises InputError if the model is not a causal LM with a body that gives hidden states.
    """
    seen: dict[str, Tensor] = {}

    def head(module: Any, arguments: Any, output: Tensor) -> Tensor:
        seen["input"] = arguments[0]
        seen["ramp"] = torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output.dtype)
        return seen["ramp"]

    embedding = lm.get_output_embeddings()
    hook = (
        nullcontext() if embedding is None else embedding.register_forward_hook(head)
    )  # also a context, which ends it
    ids = torch.zeros(1, 2, dtype=torch.int64, device=lm.device)
    mixed = len({p.dtype for p in lm.parameters() if p.is_floating_point()}) > 1  # such a model computes under autocast
    try:
        with hook, torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = lm(input_ids=ids, use_cache=False).logits
            states = getattr(lm.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    except Exception as error:
        raise InputError(
            f"policy: {type(lm).__name__} cannot be run on plain token ids ({type(error).__name__}: {error}). Use a causal "
            "language model of transformers."
        ) from error
    if states is None:
        raise InputError(
            f"policy: {type(lm).__name__} has no body that gives hidden states. Use a causal language model."
        )
    plain = (
        "input" in seen
        and torch.equal(seen["input"], states)
        and torch.equal(logits.to(seen["ramp"].dtype), seen["ramp"])
    )
    return Anatomy(width=states.shape[-1], plain_head=plain)
