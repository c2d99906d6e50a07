"""Reward model: a sequence classifier with one label, trained on preference pairs by the Bradley-Terry loss.

    python recipes/reward_model.py --model runs/sft --dataset pairs.jsonl --output_dir runs/reward_model

Rows have `prompt`, `chosen` and `rejected`. The score is read at the last real token, the EOS, as stock
AutoModelForSequenceClassification does, so the result loads with that class. Its usual scalar head has no bias, so
scores cannot be shifted to mean 0 after training within that class; `center_coefficient` keeps them near 0 instead.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
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
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer

from rlhf.commands.cli import run_command
from rlhf.core.preference import bradley_terry_loss
from rlhf.data.supervised import tokenize_preferences
from rlhf.errors import InputError
from rlhf.models.loading import from_pretrained


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(SupervisedConfig):
    """Settings of the reward model."""

    margin: float = 0.0
    """Gap that the loss asks for between the scores of chosen and rejected (arXiv 2307.09288)."""
    center_coefficient: float = 0.01
    """Weight of (chosen + rejected)^2, which holds the mean score near 0 (arXiv 2312.09244); 0 turns this off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "center_coefficient"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, but it is {getattr(self, name)}.")


def pad_pairs(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `chosen_ids`, `rejected_ids` and their masks, all (pairs, time) with one common time.

    Right padding keeps position 0 on the first real token also in models with absolute positions.
    """
    longest = max(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
    batch = {}
    for side in ("chosen", "rejected"):
        column = [list(row[f"{side}_ids"]) for row in rows]
        batch[f"{side}_ids"] = torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids in column])
        batch[f"{side}_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in column])
    return batch


class RewardTrainer(Trainer):
    """`Trainer` with the Bradley-Terry loss; chosen and rejected pass through the model in one forward."""

    loss_is_scaled_for_ga = False  # the loss is a mean over pairs, so Trainer divides it by the accumulation steps

    def __init__(self, *args: Any, config: RewardModelConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Mean loss over the pairs and, with `return_outputs`, the scores as (pairs, 2): chosen, rejected."""
        scores = model(
            input_ids=torch.cat([inputs["chosen_ids"], inputs["rejected_ids"]]),
            attention_mask=torch.cat([inputs["chosen_mask"], inputs["rejected_mask"]]),
        ).logits
        chosen, rejected = scores.squeeze(-1).float().chunk(2)
        loss = bradley_terry_loss(
            chosen, rejected, margin=self.config.margin, center_coefficient=self.config.center_coefficient
        ).mean()
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor, None]:
        with torch.no_grad():
            loss, scores = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.detach(), scores, None


def pair_metrics(scores: np.ndarray) -> dict[str, float]:
    """Accuracy (a tie is half right), mean margin, mean and standard deviation of scores; `scores` is (pairs, 2)."""
    gaps = scores[:, 0] - scores[:, 1]
    return {
        "eval_accuracy": float(((gaps > 0) + 0.5 * (gaps == 0)).mean()),
        "eval_margin": float(gaps.mean()),
        "eval_score_mean": float(scores.mean()),
        "eval_score_std": float(scores.std()),
    }


def load_reward_model(path: str, seed: int) -> PreTrainedModel:
    """The backbone at `path` with a scalar head; new heads are N(0, 1 / (width + 1)) (Ziegler et al. 2019)."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # otherwise prints a table saying that the head is new, as intended
    try:
        options = {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True}
        model, report = from_pretrained(AutoModelForSequenceClassification, path, "model", **options)
    finally:
        transformers.logging.set_verbosity(level)
    new_heads = [name for name in report["missing_keys"] if name.rpartition(".")[0] in ("score", "classifier")]
    for name in new_heads:
        weight = model.get_parameter(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (weight.shape[-1] + 1) ** -0.5)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Turn off every dropout layer and dropout rate, so that scores in training are those of the finished model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # rates that attention layers keep as numbers
                setattr(module, name, 0.0)


def fit_reward_model(model: PreTrainedModel, inputs: Inputs, config: RewardModelConfig) -> Path:
    """Train `model` in place on preference rows, print one line, save to `config.output_dir` and return that folder."""
    check_output_dir(config)
    tokenizer = inputs.tokenizer
    match_special_tokens(model, tokenizer)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            f"The tokenizer pads with its EOS token {tokenizer.eos_token!r}, so a stock classifier would not read "
            "the score at EOS. Give it a pad token of its own (one that texts do not contain) and save it again."
        )
    disable_dropout(model)
    train_set, eval_set = inputs.tokenized(tokenize_preferences, config.max_tokens)
    trainer = RewardTrainer(
        model=to_train(model, config, "SEQ_CLS"),
        args=training_arguments(config),
        train_dataset=train_set,
        data_collator=lambda rows: pad_pairs(rows, tokenizer.pad_token_id),
        config=config,
    )
    metrics = fit(trainer, config)
    held_out = ""
    if eval_set is not None:
        metrics |= pair_metrics(trainer.predict(eval_set).predictions)
        held_out = (
            f", held-out pairs: accuracy {metrics['eval_accuracy']:.1%}, margin {metrics['eval_margin']:.2f}, "
            f"scores {metrics['eval_score_mean']:.2f} +- {metrics['eval_score_std']:.2f}"
        )
    folder = save(trainer, tokenizer, metrics, config)
    report("reward model", trainer, f"{len(train_set)} pairs", metrics, held_out, config)
    return folder


def train_reward_model(config: RewardModelConfig) -> Path:
    """Load what `config` names, train, and return the folder of the result."""
    inputs = load_inputs(config)
    return fit_reward_model(load_reward_model(config.model, config.seed), inputs, config)


if __name__ == "__main__":
    run_command(RewardModelConfig, train_reward_model, "Bradley-Terry reward model on preference pairs.")
