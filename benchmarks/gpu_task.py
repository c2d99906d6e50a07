"""The task of gpu.py, made in memory: completions of digits, rewarded for even ones. Needs torch and transformers alone."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf import (
    GenerationConfig,
    GRPOConfig,
    GRPOTrainer,
    GRPOTrainerConfig,
    PPOTrainer,
    PPOTrainerConfig,
    RewardModel,
    Trainer,
    UpdateConfig,
)

DIGITS = "0123456789"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *DIGITS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def even_digits(completions: list[str], **_: Any) -> list[float]:
    """The share of even digits of each completion; 0 for an empty one."""
    return [sum(digit in "02468" for digit in text) / max(1, len(text)) for text in completions]


def shape(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Settings of a Llama for this tokenizer."""
    return {
        "vocab_size": 4 + len(DIGITS),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "initializer_range": hidden**-0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


SMALL = shape(64, 2, 4)
LARGE = shape(1024, 16, 16)
"""0.2 billion parameters."""


def language_model(size: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


def reward_model(size: dict[str, Any]) -> RewardModel:
    """Random scores: enough to run a reward model beside the policy."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**size, num_labels=1)).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RewardModel(model.to(device), policy_tokenizer=tokenizer(), reward_tokenizer=tokenizer())


def make_trainer(
    kind: str,
    folder: Path,
    size: dict[str, Any],
    *,
    prompts: int,
    tokens: int,
    peft_config: Any = None,
    critic: str = "head",
    **settings: Any,
) -> Trainer:
    """A PPO trainer (reward function and reward model, reference, value head) or a GRPO trainer (reward function).

    Args:
        kind: "PPO" or "GRPO".
        folder: the run's output_dir.
        size: of the language model.
        prompts: completions per step, in groups of 8 for GRPO.
        tokens: length limit of a completion.
        peft_config, critic: of the trainer.
        settings: further ones of the trainer's config.
    """
    groups = prompts // 8 if kind == "GRPO" else prompts
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "prompts_per_step": groups,
        "generation": GenerationConfig(max_new_tokens=tokens, completions_at_once=1024),
        "checkpoint_every": 0,
        "lr_schedule": "constant",
        **settings,
    }
    rows = [{"prompt": f"{index:03d}"} for index in range(groups)]
    lm = language_model(size)
    if kind == "GRPO":
        config = GRPOTrainerConfig(**common, grpo=GRPOConfig(completions_per_prompt=8))
        return GRPOTrainer(lm, even_digits, rows, config, tokenizer=tokenizer(), peft_config=peft_config)
    update = UpdateConfig(num_epochs=2, minibatch_size=prompts // 2)
    config = PPOTrainerConfig(**common, update=update, reward_weights=[1.0, 0.01])
    rewards = [even_digits, reward_model(size)]
    return PPOTrainer(lm, rewards, rows, config, tokenizer=tokenizer(), peft_config=peft_config, critic=critic)
