"""Language models as policies: a causal LM, with its adapters and its critic, in one module."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.core.logprobs import entropy, logprobs_and_entropy, token_logprobs
from rlhf.models.adapters import Adapters, adapted
from rlhf.models.critic import AdapterCritic, Critic, CriticChoice, HeadCritic, ModelCritic, load_critic
from rlhf.models.loading import load_causal_lm
from rlhf.models.states import Anatomy, anatomy_of, at, states_before
from rlhf.training.weights import named_tensors
from rlhf.types import Inputs, PolicyOutputs

LOGITS_AT_ONCE = 2**25
"""Numbers in one chunk of logits (128 MB in float32); longer batches are scored in several chunks."""


class Policy(nn.Module):
    """A causal LM, its adapters if it has any, and a critic if one is asked for.

    Sequences are right-padded: `input_ids` (rows, width) holds prompt, completion, padding; `prompt_lengths` is (rows,).
    Causal attention never looks to the right, so padding has no effect and needs no attention mask. Log-probs are of
    softmax(logits / temperature), as in sampling. Always in eval mode: dropout would make the first ratio differ from 1.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float = 1.0,
        critic: CriticChoice | None = None,
        adapters: Adapters | None = None,
        anatomy: Anatomy | None = None,
    ) -> None:
        """adapters: those in `lm`. anatomy: if it is known; else `lm` is run on two tokens. Raises InputError if `lm` is no
        causal LM, or the critic does not fit it."""
        super().__init__()
        self.lm = lm
        self.adapters = adapters
        self.temperature = temperature
        lm.eval()
        anatomy = anatomy or anatomy_of(lm)
        self.chunk_tokens = max(1, LOGITS_AT_ONCE // lm.config.get_text_config().vocab_size)
        self._own_forward = not anatomy.plain_head
        self.critic = None if critic is None else _critic(critic, lm, anatomy.width, adapters)
        self.eval()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the language model's weights by name, for an engine; made one at a time."""
        tensors = named_tensors(self.lm)
        if self.adapters is not None:
            merged = self.adapters.merged({name: whole(tensor) for name, tensor in self.lm.state_dict().items()})
            tied: Any = getattr(self.lm, "_tied_weights_keys", None) or {}
            twice = {a for a in tied if a in merged and torch.equal(merged[a], merged.get(tied[a], merged[a]))}
            tensors = {name: tensor for name, tensor in merged.items() if name not in twice}
        return ((name, whole(tensor).detach().clone()) for name, tensor in tensors.items())

    def forward(
        self, inputs: Inputs, actions: Tensor, *, with_values: bool = False, with_entropy: bool = False
    ) -> PolicyOutputs:
        """Log-probs (and values, entropies) of the completion tokens `actions`, (rows, time); arbitrary at padding.

        logits[t] scores the token at t + 1, and V is the value of the state *before* each token, so both read the hidden
        states from the prompt's last token on.
        """
        lengths = inputs["prompt_lengths"]
        ids = inputs["input_ids"][:, : int(lengths.max()) + actions.shape[1]]
        places = (lengths - 1).unsqueeze(1) + torch.arange(actions.shape[1], device=ids.device)
        places = places.clamp(max=ids.shape[1] - 1)
        states = states_before(self.lm, ids, places)
        if self._own_forward:
            logits = at(self.lm(input_ids=ids, use_cache=False).logits, places)
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
        values = self.critic(states, ids, places) if with_values and self.critic is not None else None
        return PolicyOutputs(logprobs=logprobs, values=values, entropy=entropies)

    def decode(self, **inputs: Any) -> Any:
        """The causal LM's own forward, for sampling, so that all computation goes through this module."""
        return self.lm(**inputs)

    def with_adapter(self, name: str | None) -> AbstractContextManager[None]:
        """Compute with another adapter inside the block; None: with the base alone."""
        assert self.adapters is not None, "the policy has no adapters"
        return self.adapters.active(name)

    def train(self, mode: bool = True) -> "Policy":
        """Does nothing: the policy stays in eval mode, see the class."""
        return super().train(False)


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, also if each process holds a share of it; all processes then call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_policy(path: str, *, temperature: float = 1.0, setting: str = "policy") -> Policy:
    """The policy at a path or hub name, an exported adapter with its base included."""
    lm, adapters = adapted(load_causal_lm(path, setting=setting))
    return Policy(lm, temperature=temperature, adapters=adapters)


def _critic(choice: CriticChoice, lm: PreTrainedModel, width: int, adapters: Adapters | None) -> Critic:
    like = next(lm.parameters())
    if choice == "head":
        return HeadCritic(width, like)
    if choice == "adapter":
        assert adapters is not None, "a value adapter needs adapters"
        return AdapterCritic(adapters, width, like)
    return ModelCritic(load_critic(choice) if isinstance(choice, str) else choice)
