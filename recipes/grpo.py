"""GRPO and its relatives: a language model learns from groups of its own completions and what rewards say about them.

    accelerate launch recipes/grpo.py                                       # embedded task, offline, minutes on 2 cores
    accelerate launch recipes/grpo.py --config my_grpo.yaml --reward my_rewards.py:correct --reward my_rewards.py:format

Without `--policy` a small model learns to add (grpo_pipeline.py). Every setting of rlhf/config.py and
rlhf/algorithms/grpo.py works as `--name value` and in a YAML file; recipes/configs/ has some that are ready to use.
"""

import sys
from dataclasses import dataclass
from typing import Any

import transformers
from command import UserRun, embedded_by_default, say_where
from datasets import Dataset

from rlhf.algorithms.grpo import GRPOConfig
from rlhf.algorithms.grpo_presets import PRESETS
from rlhf.cli import guard, parse
from rlhf.config import GRPOTrainerConfig
from rlhf.errors import InputError
from rlhf.grpo_trainer import GRPOTrainer
from rlhf.models import load_tokenizer
from rlhf.rows import load_rows


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(UserRun, GRPOTrainerConfig):
    """Settings of the command: what to train on what, and how (GRPOTrainerConfig)."""

    trainer_config = GRPOTrainerConfig

    preset: str | None = None
    """Start from what a paper published: grpo, dr_grpo, dapo, gspo, cispo, rloo or reinforce_pp. Other settings win."""
    output_dir: str = "runs/grpo"
    """Directory of this run: checkpoints, metrics, and in the end the policy."""
    dataset_split: str = "train"
    """Part of `dataset` to train on, if it is a directory or hub data set; also a slice, such as train[:1000]."""
    eval_split: str = "train"
    """Part of `eval_dataset` to evaluate on."""
    prompt_column: str = "prompt"
    """Column that holds the prompts. Under another name than "prompt", texts become a user's turn if the tokenizer has a
    chat template. The other columns reach the reward functions."""
    system_prompt: str | None = None
    """System turn before each prompt, which makes it a conversation: the tokenizer needs a chat template."""


def prompt_rows(rows: Dataset, column: str, system_prompt: str | None, *, chat: bool, setting: str) -> Dataset:
    """The rows with their prompts in the column "prompt"; as conversations if `chat` or if there is a system prompt.

    A column "prompt" that is not the one asked for makes room. Prompts that are conversations already only get the system
    turn.
    """
    if column == "prompt" and system_prompt is None:
        return rows
    if column not in rows.column_names:
        raise InputError(
            f"prompt_column={column!r}: {setting} has the columns {', '.join(rows.column_names)}. Name one of them."
        )
    if column != "prompt":
        rows = rows.remove_columns([name for name in rows.column_names if name == "prompt"])
        rows = rows.rename_column(column, "prompt")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if not system and not chat:
        return rows

    def conversation(prompt: Any) -> Any:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*system, *turns] if turns else turns  # an empty one is reported with its row by the trainer

    return rows.map(
        lambda row: {"prompt": conversation(row["prompt"])}, remove_columns=["prompt"], desc=f"prompts of {setting}"
    )


def _prompts(config: GRPORecipe, tokenizer: Any, setting: str, split: str) -> Dataset | None:
    name = getattr(config, setting)
    if name is None:
        return None
    rows = load_rows(name, split, setting=setting)
    chat = config.prompt_column != "prompt" and bool(tokenizer.chat_template)
    return prompt_rows(rows, config.prompt_column, config.system_prompt, chat=chat, setting=setting)


def train(config: GRPORecipe) -> None:
    """The user's policy on the user's prompts and rewards."""
    rewards = config.rewards()
    named = config.tokenizer or config.policy
    tokenizer = load_tokenizer(named, setting="tokenizer" if config.tokenizer else "policy")
    trainer = GRPOTrainer(
        config.policy,
        rewards,
        _prompts(config, tokenizer, "dataset", config.dataset_split),
        config.training(),
        tokenizer=tokenizer,
        eval_dataset=_prompts(config, tokenizer, "eval_dataset", config.eval_split),
    )
    trainer.train(resume=config.resume, overwrite=config.overwrite)
    say_where(config.output_dir)


def main(config: GRPORecipe) -> None:
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    if config.policy is not None:
        train(config)
    else:
        import grpo_pipeline  # beside this file; it needs nothing that a user's own run needs

        grpo_pipeline.run(config)


def settings(arguments: list[str]) -> GRPORecipe:
    """From the command line: what the user set, else the preset's value, else the default."""
    description = "GRPO fine-tuning of a language model."
    config = parse(GRPORecipe, arguments, description=description)
    if config.preset is None:
        return config
    GRPOConfig.preset(config.preset)  # refuses an unknown one
    return parse(GRPORecipe, arguments, description=description, defaults={"grpo": PRESETS[config.preset]})


if __name__ == "__main__":
    with guard():
        main(settings([*embedded_by_default(sys.argv[1:], "grpo_embedded.yaml"), *sys.argv[1:]]))
