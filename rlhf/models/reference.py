"""The reference policy, from which the KL penalty keeps the policy close: a frozen copy, or the base of its adapters."""

from copy import deepcopy
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.adapters import REFERENCE
from rlhf.models.policy import Policy
from rlhf.training.weights import fingerprint
from rlhf.types import Inputs, PolicyOutputs


class Reference(Protocol):
    """A policy that does not change."""

    @property
    def fingerprint(self) -> str:
        """Tells reference policies apart. Ask for it first on the device, where it is fast, while the tensors are whole."""
        ...

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is one of its own."""
        ...

    def __call__(self, inputs: Inputs, actions: Tensor) -> PolicyOutputs:
        """Log-probs of `actions`, as `Policy.forward`."""
        ...


class FrozenReference:
    """A model of its own, without gradients."""

    def __init__(self, lm: PreTrainedModel, *, temperature: float, dtype: torch.dtype | None = None) -> None:
        """lm: is frozen and used as it is; dtype: convert it to this type."""
        self.module: Policy = Policy(lm, temperature=temperature).requires_grad_(False)
        if dtype is not None:
            self.module.to(dtype)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.module)

    def __call__(self, inputs: Inputs, actions: Tensor) -> PolicyOutputs:
        return self.module(inputs, actions)


class AdapterReference:
    """The policy's own base, with its adapter switched off, or with a frozen copy of the adapter that it started from."""

    module = None

    def __init__(self, policy: Policy) -> None:
        """policy: as training begins. A copy of its adapter is added if that has an effect already."""
        assert policy.adapters is not None, "the policy has no adapters"
        self.policy = policy
        self.adapter = None if policy.adapters.is_fresh else REFERENCE
        if self.adapter is not None:
            policy.adapters.freeze_copy(self.adapter)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.policy, of=lambda parameter: not parameter.requires_grad)

    def __call__(self, inputs: Inputs, actions: Tensor) -> PolicyOutputs:
        with self.policy.with_adapter(self.adapter):
            return self.policy(inputs, actions)


def frozen_copy(lm: PreTrainedModel, *, temperature: float, dtype: torch.dtype | None = None) -> FrozenReference:
    """The reference policy: a copy of the current weights."""
    return FrozenReference(deepcopy(lm), temperature=temperature, dtype=dtype)
