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
from rlhf.trainers.config import TrainerConfig


def place(
    policy: Policy, reference: Reference | None, rewards: Rewards, config: TrainerConfig, distributed: Distributed
) -> None:
    """Move policy and reference to the device, and spread what is not trained; the learner spreads the policy itself."""
    policy.to(distributed.device)
    if config.gradient_checkpointing:
        recompute_layers(policy)
    if reference is not None and reference.module is not None:
        reference.module.to(distributed.device)
        distributed.layout.freeze(reference.module)
    for model in reward_models(rewards):
        distributed.layout.freeze(model)


def reward_models(rewards: Rewards) -> Iterator[Module]:
    """The models among the rewards."""
    return (function.model for function in rewards.functions if isinstance(function, RewardModel))


def gathered(policy: Policy, rewards: Rewards, distributed: Distributed, models: str) -> AbstractContextManager[Any]:
    """Context in which this process holds all weights of the "policy" or of the "rewards", see `Sampler.gathered`."""
    modules = [policy] if models == "policy" else list(reward_models(rewards))
    return distributed.layout.inference(*modules, gather=True)
