"""Supervised fine-tuning on completions: the loss counts completion tokens and their EOS, never the prompt or padding.

    python recipes/sft.py --model Qwen/Qwen3-0.6B --dataset rows.jsonl --output_dir runs/sft

Rows have `prompt` and `completion` columns, or `messages`. The result loads with stock AutoModelForCausalLM.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from supervised import (
    Inputs,
    SupervisedConfig,
    check_output_dir,
    fit,
    load_inputs,
    match_special_tokens,
    report,
    save,
    to_train,
    training_arguments,
)
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from rlhf.commands.cli import run_command
from rlhf.data.supervised import tokenize_completions
from rlhf.models.loading import load_causal_lm


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Settings of supervised fine-tuning."""


def pad_completions(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """(rows, time) batch, padded on the right; labels are -100 and the attention mask 0 on padding.

    The mask comes from the lengths, so the model learns to stop even if the tokenizer pads with its EOS.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(column: list[list[int]], value: int) -> Tensor:
        return torch.tensor([list(ids) + [value] * (longest - len(ids)) for ids in column])

    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "labels": pad([row["labels"] for row in rows], -100),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def fine_tune(model: PreTrainedModel, inputs: Inputs, config: SFTConfig) -> Path:
    """Train `model` in place on rows of text, print one line, save to `config.output_dir` and return that folder."""
    check_output_dir(config)
    tokenizer = inputs.tokenizer
    match_special_tokens(model, tokenizer)
    train_set, eval_set = inputs.tokenized(tokenize_completions, config.max_tokens)
    trainer = Trainer(
        model=to_train(model, config, "CAUSAL_LM"),
        args=training_arguments(config),
        train_dataset=train_set,
        data_collator=lambda rows: pad_completions(rows, tokenizer.pad_token_id),
    )
    metrics = fit(trainer, config)
    held_out = ""
    if eval_set is not None:
        metrics["eval_loss"] = trainer.evaluate(eval_set)["eval_loss"]
        held_out = f", held-out loss {metrics['eval_loss']:.3f} (perplexity {math.exp(metrics['eval_loss']):.2f})"
    folder = save(trainer, tokenizer, metrics, config)
    report("sft", trainer, f"{len(train_set)} rows", metrics, held_out, config)
    return folder


def train_sft(config: SFTConfig) -> Path:
    """Load what `config` names, fine-tune, and return the folder of the result."""
    inputs = load_inputs(config)
    return fine_tune(load_causal_lm(config.model, setting="model"), inputs, config)


if __name__ == "__main__":
    run_command(SFTConfig, train_sft, "Supervised fine-tuning on the tokens of the completions.")
