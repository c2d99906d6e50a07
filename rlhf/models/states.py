"""Hidden states of a transformers model at the places where tokens are predicted and states are valued."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.loading import vocabulary_size


def states_before(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """The last hidden states at `places` (rows, time) of right-padded `ids` (rows, width): (rows, time, features)."""
    return at(body_of(model)(input_ids=ids, use_cache=False).last_hidden_state, places)


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that gives hidden states.

    A few classes (Llama 4's) give base_model a name that they have not, so that it is the model itself: then the part
    that is a model by itself.
    """
    body: PreTrainedModel = model.base_model  # type: ignore[assignment]
    if body is not model:
        return body
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)


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
    """Run `lm` on a few tokens and look. The logits that its head gives are replaced by a ramp from -100 to 100, so that
    whatever the model does to logits (soft-capping, scaling) shows, whatever their size.

    Raises InputError if the model is not a causal LM with a body that gives hidden states.
    """
    if getattr(lm.config, "is_encoder_decoder", False):
        raise InputError(
            f"policy: {type(lm).__name__} is an encoder-decoder: it reads the prompt with another part than the one "
            "that writes. Use a causal language model."
        )
    seen: dict[str, Tensor] = {}

    def body(module: Any, arguments: Any, output: Any) -> None:
        seen["states"] = output.last_hidden_state

    def head(module: Any, arguments: Any, output: Tensor) -> Tensor:
        seen["input"] = arguments[0]
        seen["ramp"] = torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output.dtype)
        return seen["ramp"]

    part, embedding = body_of(lm), lm.get_output_embeddings()
    hooks = [] if part is lm else [part.register_forward_hook(body)]
    if embedding is not None:
        hooks.append(embedding.register_forward_hook(head))
    ids = some_tokens(lm, 4).unsqueeze(0)
    mixed = len({p.dtype for p in lm.parameters() if p.is_floating_point()}) > 1  # such a model computes under autocast
    try:
        with torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = lm(input_ids=ids, use_cache=False).logits
            if "states" not in seen and part is not lm:  # its forward calls what is inside the body
                part(input_ids=ids, use_cache=False)
    except Exception as error:
        remedy = "Use a causal language model of transformers"
        if lm.dtype == torch.float64:
            remedy += ", in float32, or with policy.set_experts_implementation('eager') if it has experts"
        raise InputError(
            f"policy: {type(lm).__name__} cannot be run on plain token ids ({type(error).__name__}: {error}). {remedy}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if "states" not in seen:
        raise InputError(
            f"policy: {type(lm).__name__} has no body that gives hidden states. Use a causal language model."
        )
    plain = (
        "input" in seen
        and bool(seen["states"].any())  # zeros would hide what is done to them
        and torch.equal(seen["input"], seen["states"])
        and torch.equal(logits.to(seen["ramp"].dtype), seen["ramp"])
    )
    return Anatomy(width=seen["states"].shape[-1], plain_head=plain)


def some_tokens(lm: PreTrainedModel, count: int) -> Tensor:
    """`count` token ids from all over the vocabulary, without the pad token, whose embedding is often 0: (count,)."""
    embedding: Any = lm.get_input_embeddings()
    size = vocabulary_size(lm)
    unused = {getattr(embedding, "padding_idx", None), lm.config.get_text_config().pad_token_id}
    ids = [token for token in range(size) if token not in unused] or [0]
    return torch.tensor([ids[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count)], device=lm.device)
