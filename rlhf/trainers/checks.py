"""Checks, before anything is computed, that a run's settings, data and model fit together."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.core.random import SAMPLING
from rlhf.data.prompts import PromptDataset
from rlhf.errors import InputError
from rlhf.models.critic import ModelCritic
from rlhf.models.loading import check_precision, check_vocabulary, end_tokens, vocabulary_size
from rlhf.models.policy import Policy
from rlhf.models.states import some_tokens
from rlhf.rewards.combine import Rewards
from rlhf.rewards.model import RewardModel
from rlhf.rollout.engine import Completion, Key, Request, RolloutEngine, Sampling
from rlhf.rollout.episode import pack, single_turn
from rlhf.rollout.in_process import InProcessEngine
from rlhf.trainers.config import TrainerConfig
from rlhf.training.sampler import Agreement


def check_batch_sizes(
    config: TrainerConfig, completions_per_prompt: int, eval_data: PromptDataset | None, processes: int
) -> None:
    """InputError if minibatch_size does not divide a step's completions, or some process would get no prompt."""
    completions = config.prompts_per_step * completions_per_prompt
    size = config.update.minibatch_size or completions
    if completions % size:
        raise InputError(
            f"update.minibatch_size={size} does not divide the {completions} completions of a step "
            f"(prompts_per_step={config.prompts_per_step} x {completions_per_prompt}). "
            "Choose sizes so that every optimizer step sees the same number of completions."
        )
    prompts = min(config.prompts_per_step, len(eval_data) if eval_data else math.inf)
    if prompts < processes:
        raise InputError(
            f"prompts_per_step (or eval_dataset) has {prompts} prompts, which leaves some of the {processes} processes "
            "without one. Give more, or start fewer processes."
        )


def check_rewards(rewards: Rewards, *data: PromptDataset | None) -> None:
    """InputError if a reward function needs a column that one of the data sets does not have."""
    for prompts in filter(None, data):
        rewards.check_columns(prompts[0].columns)


def check_model(lm: PreTrainedModel, tokenizer: Any, config: TrainerConfig, *data: PromptDataset | None) -> None:
    """InputError if the model cannot be trained on these prompts."""
    if not any(p.requires_grad for p in lm.parameters()):
        raise InputError(
            "policy: requires_grad is False for all of its weights, so that at most a value head would be trained. "
            "Call policy.requires_grad_(True), or leave some layers trainable."
        )
    check_vocabulary(lm, tokenizer)
    check_precision(lm)
    end_tokens(lm, tokenizer.eos_token_id)
    _check_positions(lm, "policy", config, *data)


def check_critic(
    policy: Policy, tokenizer: Any, config: TrainerConfig, rewards: Rewards, *data: PromptDataset | None
) -> None:
    """InputError if the critic is a model of its own that cannot value these prompts, or that also gives the rewards."""
    if not isinstance(policy.critic, ModelCritic):
        return
    model = policy.critic.model
    if vocabulary_size(model) < len(tokenizer):
        raise InputError(
            f"critic: it embeds {vocabulary_size(model)} tokens, but the policy's tokenizer has {len(tokenizer)}, and the "
            "critic reads the policy's tokens. Give a model with the policy's vocabulary."
        )
    _check_positions(model, "critic", config, *data)
    trained = {id(parameter) for parameter in model.parameters()}
    for function in rewards.functions:
        if isinstance(function, RewardModel) and any(id(p) in trained for p in function.model.parameters()):
            raise InputError(
                f"critic: it is the reward model {function.name!r} itself, whose scores training would change. Give a copy "
                "of it, or its path."
            )


def _check_positions(lm: PreTrainedModel, setting: str, config: TrainerConfig, *data: PromptDataset | None) -> None:
    longest = max(prompts.longest for prompts in data if prompts) + config.generation.max_new_tokens
    limit = _positions(lm)
    if longest > limit:
        raise InputError(
            f"generation.max_new_tokens={config.generation.max_new_tokens}: with the longest prompt that makes "
            f"{longest} tokens, but the {setting} has positions for {limit}. Lower it or max_prompt_tokens."
        )


def _positions(lm: PreTrainedModel) -> float:
    """The longest sequence that the model's configuration allows. MPT and DBRX name it max_seq_len."""
    text = lm.config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit is not None), math.inf)


@torch.no_grad()
def check_sampling(engine: RolloutEngine) -> None:
    """InputError unless the policy samples what it is trained on: a few tokens, sampled with its cache and scored without.

    Prompts of unequal length, two completions of each, and rows that end early: whatever a model does with padding,
    positions and its cache shows here, before there is a rollout. Nothing is drawn from a generator or kept. Engines other
    than the policy itself are checked in each step alone, and so is a policy whose weights are in shards already, or that
    has positions for fewer tokens than this takes.
    """
    if not isinstance(engine, InProcessEngine) or any(hasattr(p, "full_tensor") for p in engine.policy.parameters()):
        return
    policy = engine.policy
    if _positions(policy.lm) < 9:
        return
    name = type(policy.lm).__name__
    ids = some_tokens(policy.lm, 6).tolist()
    requests = [
        Request(prompt, Key(0, SAMPLING, 0, slot, copy), max_new_tokens=3 - copy)
        for slot, prompt in enumerate((ids, ids[:2], ids[3:]))
        for copy in range(2)
    ]
    sampling = Sampling(max_new_tokens=3, temperature=policy.temperature, end_ids=())
    try:
        completions = [future.result() for future in engine.submit(requests, sampling)]
        gaps = _gaps(engine, requests, completions)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"policy: {name} cannot sample with a cache of keys and values ({type(error).__name__}: {error}). "
            f"{_OTHER_MODEL}"
        ) from error
    gap = gaps.max().item() if engine.promises.exact else gaps.mean().item()
    if math.isnan(gap):
        raise InputError(
            f"policy: {name} gives log-probs that are not numbers (NaN), for ordinary tokens. Look for NaN in its weights, "
            "and whether it can compute in this dtype."
        )
    if not gap < engine.promises.logprob_gap:
        raise InputError(
            f"policy: {name} samples with other log-probs than it is trained on: with a cache and padded prompts they "
            f"differ by {gap:.3g} nats from those of the whole sequence, and {engine.promises.logprob_gap:g} is allowed. "
            f"{_OTHER_MODEL}"
        )


_OTHER_MODEL = (
    "Use another model with attention in every layer, or another attn_implementation, dtype or version of it."
)


def _gaps(engine: InProcessEngine, requests: list[Request], completions: list[Completion]) -> torch.Tensor:
    """How far the log-probs of sampling are from those of the training forward, token by token."""
    packed = pack([single_turn(r.ids, c) for r, c in zip(requests, completions, strict=True)], engine.policy.lm.device)
    with engine.distributed.autocast():
        scored = engine.policy(packed.inputs, packed.actions).logprobs
    return (scored - packed.sampling_logprobs)[packed.mask].abs()


def engine_note(engine: RolloutEngine) -> str | None:
    """The line that says what a run with this engine cannot promise; None if it promises everything."""
    if engine.promises.stateless:
        return None
    return (
        "note: this engine's completions depend on what else it computes, so an equal or resumed run gives other ones"
    )


def agreement_with(engine: RolloutEngine, lm: PreTrainedModel) -> Agreement:
    """How far the engine's log-probs may be from those of the training forward, as the engine promises."""
    remedy = (
        f"{type(lm).__name__} computes different log-probs with and without a KV cache: use another attention "
        "implementation or precision, or report the model."
    )
    if not isinstance(engine, InProcessEngine):
        remedy = "Check the engine: its weights, adapter, temperature, and which log-probs it reports."
    return Agreement(bound=engine.promises.logprob_gap, exact=engine.promises.exact, remedy=remedy)
