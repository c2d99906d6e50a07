"""Critics: they value the state before each token. A head on the policy's states, a model of its own, or an adapter.

Each is a module that is called as critic(states, ids, places) -> (rows, time): the policy's hidden states at `places`
(rows, time) of `ids` (rows, width), right-padded, and those themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import AutoConfig, PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.adapters import CRITIC, Adapters
from rlhf.models.loading import check_precision, load_classifier, load_model
from rlhf.models.states import states_before

CriticChoice: TypeAlias = Literal["head", "adapter"] | str | PreTrainedModel
"""A head on the policy's states, a value adapter, a reward model, or the path of one or of a causal LM."""
HEAD_FILE = "value_head.safetensors"
FOLDER = "critic"


class ValueHead(nn.Module):
    """Hidden states (rows, time, width) -> values (rows, time), in float32 or wider. All values start at 0."""

    computes_in_float32 = True

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.linear = skip_init(nn.Linear, width, 1, dtype=dtype, device=like.device)  # draws no random numbers
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class Critic(nn.Module):
    """What all critics have in common."""

    apart = True
    """Whether it shares no trained weights with the policy, so that its gradient can be clipped by itself."""

    def forward(self, states: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        raise NotImplementedError

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the value loss trains."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save(self, folder: Path, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
        """Write the critic into the folder of the exported policy.

        weights: its own, by name, and the adapters of the language model, named "lm." and so on.
        """
        raise NotImplementedError


class HeadCritic(Critic):
    """A linear head on the policy's hidden states, whose gradient trains the policy's body too."""

    apart = False

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.head = ValueHead(width, like)

    def forward(self, states: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        return self.head(states)

    def save(self, folder: Path, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
        save_file(_own(weights, "head."), folder / HEAD_FILE)


class ModelCritic(Critic):
    """A sequence classifier with one label, whose score of every prefix is the value.

    So a critic made from a reward model starts with that model's scores, and the trained critic loads in stock
    transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise InputError(
                f"critic: {type(model).__name__} has no linear score with one label. Give a decoder model: a reward model "
                "with num_labels=1, or the path of one or of a causal LM."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError("critic: requires_grad is False for all of its weights. Call requires_grad_(True).")
        check_precision(model, setting="critic")
        score.computes_in_float32 = True  # type: ignore[assignment]
        self.model = model

    def forward(self, states: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        own = states_before(self.model, ids, places)
        score: nn.Linear = self.model.score  # type: ignore[assignment]
        with torch.autocast(own.device.type, enabled=False):
            return score(own.to(score.weight.dtype)).squeeze(-1)

    def save(self, folder: Path, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
        self.model.save_pretrained(folder / FOLDER, state_dict=_own(weights, "model."))
        tokenizer.save_pretrained(folder / FOLDER)


class AdapterCritic(Critic):
    """A second adapter of the policy's base, with a head on the hidden states that it gives."""

    def __init__(self, adapters: Adapters, width: int, like: Tensor) -> None:
        super().__init__()
        adapters.add_adapter(CRITIC)
        self.adapters = adapters  # no module: the base is registered once, as the policy's
        self.head = ValueHead(width, like)

    def forward(self, states: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        with self.adapters.active(CRITIC):
            return self.head(states_before(self.adapters.lm, ids, places))

    def own_parameters(self) -> list[nn.Parameter]:
        return super().own_parameters() + self.adapters.parameters(CRITIC)

    def save(self, folder: Path, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
        lm = {name.removeprefix("lm."): tensor for name, tensor in weights.items() if name.startswith("lm.")}
        self.adapters.save(folder / FOLDER, lm, CRITIC)
        save_file(_own(weights, "head."), folder / FOLDER / HEAD_FILE)


def load_critic(path: str) -> PreTrainedModel:
    """A sequence classifier with one label, in float32: a reward model as it is, or a causal LM with a new score of 0."""
    config = load_model(AutoConfig, path, "critic")
    scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if scores and config.num_labels != 1:
        raise InputError(f"critic={path!r} has {config.num_labels} labels, but a value is one number. Give one with 1.")
    with torch.random.fork_rng():  # a new score is drawn
        model = load_classifier(path, "critic")
    if not scores and isinstance(getattr(model, "score", None), nn.Linear):
        nn.init.zeros_(model.score.weight)  # type: ignore[union-attr,arg-type]
    return model


def _own(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
