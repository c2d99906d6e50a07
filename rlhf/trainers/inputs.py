"""Converts what users pass to a trainer (paths, rows, objects) to the objects that it works with."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import ListRows, Table, load_rows
from rlhf.errors import InputError
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.model import RewardModel
from rlhf.trainers.config import TrainerConfig

Reward: TypeAlias = str | Callable[..., Any]
"""A reward function, a `RewardModel`, or the path of one."""
Rows: TypeAlias = str | os.PathLike[str] | Table | Sequence[Mapping[str, Any]]
"""A path or hub name, a `datasets.Dataset`, or a list of rows."""


def as_list(rewards: Reward | Sequence[Reward]) -> list[Reward]:
    """One reward or several, as a list."""
    return [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)


def tokenizer_of(
    tokenizer: str | PreTrainedTokenizerBase | None, policy: str | PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or by default the one saved with the policy."""
    if tokenizer is None:
        if not isinstance(policy, str):
            raise InputError("tokenizer: a policy given as a module needs its tokenizer too.")
        return load_tokenizer(policy, setting="policy")
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def reward_of(reward: Reward, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Callable[..., Any]:
    """The reward as a function that scores completions of a policy with this tokenizer; a path is loaded."""
    if isinstance(reward, RewardModel):
        return reward.for_policy(tokenizer)
    if not isinstance(reward, str):
        return reward
    return RewardModel.load(reward, device, policy_tokenizer=tokenizer)


def prompts_of(
    dataset: Rows, tokenizer: PreTrainedTokenizerBase, config: TrainerConfig, setting: str = "dataset"
) -> PromptDataset:
    """The prompts as token ids, checked; `setting` names them in errors."""
    rows: Any = dataset
    if isinstance(dataset, str | os.PathLike):
        rows = load_rows(os.fspath(dataset), setting=setting)
    elif not hasattr(dataset, "column_names"):
        rows = ListRows(dataset, setting)
    return PromptDataset.build(
        rows,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        prompt_too_long=config.prompt_too_long,
        setting=setting,
    )


def adamw(config: TrainerConfig, policy: Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; eps as in the control presets and in N+ (arXiv 2403.17031, appendix)."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)
