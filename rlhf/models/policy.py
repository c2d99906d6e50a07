"""Language models as policies: a causal LM and an optional value head in one module."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.core.logprobs import entropy, logprobs_and_entropy, token_logprobs
from rlhf.training.weights import named_tensors
from rlhf.types import Inputs, PolicyOutputs

LOGITS_AT_ONCE = 2**25
"""Numbers in one chunk of logits (128 MB in float32); longer batches are scored in several chunks."""

# Settings of model families whose logits are not just output_embeddings(hidden): the LM's own forward scores these.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)


class Policy(nn.Module):
    """A causal LM with an optional value head on its last hidden states.

    Sequences are right-padded: `input_ids` (rows, width) holds prompt, completion, padding; `prompt_lengths` is (rows,).
    Causal attention never looks to the right, so padding has no effect and needs no attention mask. Log-probs are of
    softmax(logits / temperature), as in sampling. Always in eval mode: dropout would make the first ratio differ from 1.
    """

    def __init__(self, lm: PreTrainedModel, *, temperature: float = 1.0, value_head: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        config = lm.config.get_text_config()
        self.value_head = ValueHead(config.hidden_size, like=next(lm.parameters())) if value_head else None
        self.chunk_tokens = max(1, LOGITS_AT_ONCE // config.vocab_size)
        self._own_forward = any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_TRANSFORMS)
        self.eval()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the language model's weights by name, for an engine; made one at a time."""
        return ((name, tensor.detach().clone()) for name, tensor in named_tensors(self.lm).items())

    def forward(
        self, inputs: Inputs, actions: Tensor, *, with_values: bool = False, with_entropy: bool = False
    ) -> PolicyOutputs:
        """Log-probs (and values, entropies) of the completion tokens `actions`, (rows, time); arbitrary at padding.

        logits[t] scores the token at t + 1, and V is the value of the state *before* each token, so both read the hidden
        states from the prompt's last token on.
        """
        lengths = inputs["prompt_lengths"]
        ids = inputs["input_ids"][:, : int(lengths.max()) + actions.shape[1]]
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        places = (lengths - 1).unsqueeze(1) + torch.arange(actions.shape[1], device=ids.device)
        places = places.clamp(max=ids.shape[1] - 1).unsqueeze(-1)
        states = hidden.gather(1, places.expand(-1, -1, hidden.shape[-1]))
        if self._own_forward:
            logits = self.lm(input_ids=ids, use_cache=False).logits
            logits = logits.gather(1, places.expand(-1, -1, logits.shape[-1]))
            logprobs = token_logprobs(logits, actions, temperature=self.temperature)
            entropies = entropy(logits, temperature=self.temperature) if with_entropy else None
        else:
            logprobs, entropies = logprobs_and_entropy(
                states,
                self.lm.get_output_embeddings(),
                actions,
                temperature=self.temperature,
                with_entropy=with_entropy,
                chunk_tokens=self.chunk_tokens,
            )
        values = self.value_head(states) if with_values and self.value_head is not None else None
        return PolicyOutputs(logprobs=logprobs, values=values, entropy=entropies)

    def decode(self, **inputs: Any) -> Any:
        """The causal LM's own forward, for sampling, so that all computation goes through this module."""
        return self.lm(**inputs)

    def train(self, mode: bool = True) -> "Policy":
        """Does nothing: the policy stays in eval mode, see the class."""
        return super().train(False)


class ValueHead(nn.Module):
    """Hidden states (rows, time, width) -> values (rows, time), in float32 or wider. All values start at 0."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.linear = nn.Linear(width, 1, dtype=dtype, device=like.device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


def frozen_copy(lm: PreTrainedModel, *, temperature: float) -> Policy:
    """The reference policy: a copy of the current weights, without gradients."""
    return Policy(deepcopy(lm), temperature=temperature).requires_grad_(False)
