"""Puts the models of a run where they belong: on the device, and spread over the processes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch.nn import Module

from rlhf.distributed import Distributed
from rlhf.models.policy import Policy
from rlhf.models.recompute import recompute_layers
from rlhf.models.reference import Reference
from rlhf.rewards.combine import Rewards
from rlhf.rewards.model import RewardModel
from rlhf.rewards.shared import AdapterScores, share_base
from rlhf.trainers.config import TrainerConfig


def place(
    policy: Policy, reference: Reference | None, rewards: Rewards, config: TrainerConfig, distributed: Distributed
) -> None:
    """Move the models to the device, and spread what is not trained; the learner spreads the policy itself."""
    models = [function for function in rewards.functions if isinstance(function, RewardModel)]
    apart = [m.model for m in models if policy.adapters is None or not share_base(m, policy.adapters)]
    policy.to(distributed.device)
    if config.gradient_checkpointing:
        recompute_layers(policy)
    if reference is not None:
        if reference.module is not None:
            reference.module.to(distributed.device)
        _ = reference.fingerprint  # computed here, on the device and before the tensors are spread, and kept
        if reference.module is not None:
            distributed.layout.freeze(reference.module)
    for function in models:
        function.model.to(distributed.device)
    for model in apart:
        distributed.layout.freeze(model)


def gathered(policy: Policy, rewards: Rewards, distributed: Distributed, models: str) -> AbstractContextManager[Any]:
    """Context in which this process holds all weights of the "policy" or of the "rewards", see `Sampler.gathered`."""
    if models == "policy":
        return distributed.layout.inference(policy, gather=True)
    judges = list(reward_models(rewards))
    own = [judge for judge in judges if not isinstance(judge, AdapterScores)]
    shared = [policy] if len(own) < len(judges) else []
    return distributed.layout.inference(*shared, *own, gather=True)


def reward_models(rewards: Rewards) -> Iterator[Module]:
    """The models among the rewards."""
    return (function.model for function in rewards.functions if isinstance(function, RewardModel))
