"""Reward models that are adapters of the policy's own base: one backbone scores, values, refers and acts."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from rlhf.models.adapters import POLICY, Adapters, adapter_of, base_name
from rlhf.rewards.model import RewardModel


def share_base(rewards: RewardModel, adapters: Adapters) -> bool:
    """Let a reward model that is an adapter of the same base as the policy's use that base, and forget its own.

    Returns whether it does: only if every weight of the two bases is equal. Scores stay the same.
    """
    model = rewards.model
    head = getattr(getattr(model, "get_base_model", lambda: None)(), "score", None)
    if head is None or not _same_base(model.get_base_model(), adapters.lm):
        return False
    rewards.model = AdapterScores(adapters, model)
    return True


class AdapterScores(nn.Module):
    """The base with a reward adapter on, and its head; in the form of a sequence classifier, as `RewardModel` reads it."""

    def __init__(self, adapters: Adapters, model: Any) -> None:
        """model: a `PeftModel` of a sequence classifier; its adapter is copied, frozen, into `adapters`."""
        super().__init__()
        self.adapters = adapters  # no module: the base belongs to the policy
        self.name = adapters.take(model)
        classifier = model.get_base_model()
        saved = getattr(classifier.score, "modules_to_save", None)  # peft trains the head whole
        self.score = deepcopy(classifier.score if saved is None else saved[POLICY])
        self.score.requires_grad_(False)
        self.config = classifier.config

    def get_input_embeddings(self) -> nn.Module:
        return self.adapters.lm.get_input_embeddings()

    def base_model(self, **inputs: Any) -> Any:
        """Hidden states of the base with the reward adapter on."""
        with self.adapters.active(self.name):
            return self.adapters.lm.base_model(**inputs)


def _same_base(model: nn.Module, lm: nn.Module) -> bool:
    """Whether every weight of the classifier's body is one of the language model's, bit for bit."""
    own = {base_name(name): p for name, p in lm.named_parameters() if adapter_of(name) is None}
    body = {
        base_name(n): p for n, p in model.named_parameters() if adapter_of(n) is None and not n.startswith("score.")
    }
    return all(
        name in own and own[name].dtype == p.dtype and torch.equal(own[name].cpu(), p.cpu()) for name, p in body.items()
    )
