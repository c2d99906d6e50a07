"""Supervised fine-tuning on completions: the loss counts completion tokens and their EOS, never the prompt or padding.

    python recipes/sft.py --model Qwen/Qwen3-0.6B --dataset rows.jsonl --output_dir runs/sft

Rows have `prompt` and `completion` columns, or `messages`. The result loads with stock AutoModelForCausalLM.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from supervised import (
    SupervisedConfig,
    check_output_dir,
    fit,
    match_special_tokens,
    quiet_libraries,
    save,
    training_arguments,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rlhf.commands.cli import run_command
from rlhf.data.rows import load_rows
from rlhf.data.supervised import tokenize_completions
from rlhf.models.loading import load_causal_lm, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Settings of supervised fine-tuning."""


def pad_completions(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """(rows, time) batch, padded on the right; labels are -100 and the attention mask 0 on padding.

    The mask comes from lengths, so a tokenizer whose pad is its EOS still learns to stop.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(column: list[list[int]], value: int) -> Tensor:
        return torch.tensor([list(ids) + [value] * (longest - len(ids)) for ids in column])

    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "labels": pad([row["labels"] for row in rows], -100),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: datasets.Dataset,
    config: SFTConfig,
    eval_rows: datasets.Dataset | None = None,
) -> Path:
    """Train `model` in place on rows of text, print one line, save to `config.output_dir` and return that folder."""
    check_output_dir(config)
    match_special_tokens(model, tokenizer)
    train_set, eval_set = (
        None if rows is None else tokenize_completions(rows, tokenizer, max_tokens=config.max_tokens, setting=setting)
        for rows, setting in ((train_rows, "dataset"), (eval_rows, "eval_dataset"))
    )
    trainer = Trainer(
        model=model,
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
    if trainer.is_world_process_zero():
        print(
            f"sft: {len(train_set)} rows, {metrics['num_steps']:.0f} steps of {config.batch_size}, "
            f"train loss {metrics['train_loss']:.3f}{held_out}, {metrics['train_seconds']:.0f} s -> {folder}"
        )
    return folder


def train_sft(config: SFTConfig) -> Path:
    """Load what `config` names, fine-tune, and return the folder of the result."""
    check_output_dir(config)
    quiet_libraries()
    tokenizer = load_tokenizer(config.model, setting="model")
    train_rows = load_rows(config.dataset)
    eval_rows = None if config.eval_dataset is None else load_rows(config.eval_dataset, setting="eval_dataset")
    model = load_causal_lm(config.model, setting="model")
    return fine_tune(model, tokenizer, train_rows, config, eval_rows)


if __name__ == "__main__":
    run_command(SFTConfig, train_sft, "Supervised fine-tuning on the tokens of the completions.")
