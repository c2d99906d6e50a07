"""Converts what users pass to a trainer (paths, rows, objects) to the objects that it works with."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms.base import Algorithm
from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import ListRows, Table, load_rows
from rlhf.errors import InputError
from rlhf.models.adapters import Adapters, adapted
from rlhf.models.critic import CriticChoice
from rlhf.models.loading import is_adapter, load_causal_lm, load_tokenizer
from rlhf.models.policy import Policy
from rlhf.models.reference import AdapterReference, FrozenReference, Reference, frozen_copy
from rlhf.rewards.model import RewardModel
from rlhf.trainers.config import PPOTrainerConfig, TrainerConfig

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


def reward_of(
    reward: Reward, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The reward as a function that scores completions of a policy with this tokenizer; a path is loaded, as `dtype`."""
    if isinstance(reward, RewardModel):
        return reward.for_policy(tokenizer)
    if not isinstance(reward, str):
        return reward
    return RewardModel.load(reward, policy_tokenizer=tokenizer, dtype=dtype)


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


def model_of(
    policy: str | Any, config: TrainerConfig, peft_config: Any = None
) -> tuple[PreTrainedModel, Adapters | None]:
    """The language model, loaded if it is a path, and its adapters, if it has any or gets a new one by `peft_config`."""
    frozen = config.frozen_dtype
    if isinstance(policy, str):
        has_base = peft_config is not None or is_adapter(policy)
        policy = load_causal_lm(policy, dtype=(frozen or torch.float32) if has_base else torch.float32)
    lm, adapters = adapted(policy, peft_config, seed=config.seed)
    if adapters is not None and frozen is not None:
        if config.precision == "float32" and adapters.config.modules_to_save:
            raise InputError(
                "frozen_precision=bfloat16: modules_to_save are trained in float32 and cannot compute beside it. Set "
                "precision to bfloat16 too, or frozen_precision to float32."
            )
        adapters.cast_base(frozen)
    return lm, adapters


def reference_of(policy: Policy, reference: str | PreTrainedModel | None, config: TrainerConfig) -> Reference:
    """The reference policy: the one given, else the base of the policy's adapter, else a copy of the policy as it is."""
    temperature, dtype = config.generation.temperature, config.frozen_dtype
    if isinstance(reference, str):
        lm = load_causal_lm(reference, setting="reference", dtype=dtype or torch.float32)
        return FrozenReference(adapted(lm)[0], temperature=temperature, dtype=dtype)
    if reference is None and policy.adapters is not None:
        return AdapterReference(policy)
    given: Any = policy.lm if reference is None else reference
    if hasattr(given, "get_base_model"):
        given = given.get_base_model()  # its adapter stays on
    return frozen_copy(given, temperature=temperature, dtype=dtype)


def adamw(config: TrainerConfig, policy: Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; eps as in the control presets and in N+ (arXiv 2403.17031, appendix).

    The groups are "policy" and, if there is a critic, "critic" with its own learning rate and clip norm.
    """
    critic = getattr(policy, "critic", None)
    own = set() if critic is None else {id(parameter) for parameter in critic.own_parameters()}
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"name": "policy", "params": [p for p in trained if id(p) not in own]}]
    if critic is not None:
        assert isinstance(config, PPOTrainerConfig)
        rate = config.critic_learning_rate or config.learning_rate
        norm = config.critic_max_grad_norm or (config.update.max_grad_norm if critic.apart else None)
        parameters = [p for p in trained if id(p) in own]
        groups.append(
            {"name": "critic", "params": parameters, "lr_scale": rate / config.learning_rate, "max_grad_norm": norm}
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)


def critic_of(
    critic: CriticChoice | None, algorithm: Algorithm, adapters: Adapters | None, tokenizer: PreTrainedTokenizerBase
) -> CriticChoice | None:
    """The critic to make: the one asked for, by default a value head, or none if the algorithm needs no values.

    tokenizer: the policy's. InputError if the folder of a critic has one in which the tokens are others.
    """
    if "values" not in algorithm.needs:
        if critic is not None:
            raise InputError(f"critic: {type(algorithm).__name__} learns without values. Leave it out.")
        return None
    if critic == "adapter" and adapters is None:
        raise InputError('critic="adapter" is an adapter of the policy\'s base: give peft_config (--lora.r) too.')
    if isinstance(critic, str) and critic != "head" and (Path(critic).expanduser() / "tokenizer_config.json").is_file():
        own = load_tokenizer(critic, setting="critic").get_vocab()
        if not tokenizer.get_vocab().items() <= own.items():
            raise InputError(
                f"critic: {critic} has another vocabulary than the policy, whose tokens it would read. Give a model "
                "with the policy's tokenizer."
            )
    return "head" if critic is None else critic
