"""PPO fine-tuning of a language model against a reward model or reward functions.

    accelerate launch recipes/ppo_rlhf.py                                   # embedded data, offline, minutes on 2 cores
    accelerate launch recipes/ppo_rlhf.py --policy runs/sft --dataset prompts.jsonl \\
        --reward my_rewards.py:polite --output_dir runs/mine --learning_rate 1e-5

Without `--policy` the whole of RLHF runs on embedded data (pipeline.py): SFT, reward model, PPO, evaluation.
Every setting of rlhf/config.py works as `--name value` and in a YAML file given with `--config`.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import transformers

from rlhf.cli import run_command
from rlhf.config import PPOTrainerConfig
from rlhf.errors import InputError
from rlhf.reward_functions import load_reward_function
from rlhf.trainer import PPOTrainer


@dataclass(frozen=True, kw_only=True)
class PPORecipe(PPOTrainerConfig):
    """Settings of the command: what to train on what, and how (PPOTrainerConfig)."""

    output_dir: str = "runs/ppo_rlhf"
    """Directory of this run: checkpoints, metrics, and in the end the policy."""
    policy: str | None = None
    """Causal LM to train, a directory or hub name; null runs the embedded pipeline."""
    tokenizer: str | None = None
    """Its tokenizer; null takes the policy's."""
    dataset: str | None = None
    """Prompts: a JSON-lines, parquet or CSV file, a directory, or a hub name; a column "prompt" or "messages"."""
    eval_dataset: str | None = None
    """Held-out prompts."""
    reward_model: str | None = None
    """Sequence classifier with one label, a directory or hub name."""
    reward: list[str] = field(default_factory=list)
    """Reward functions, as file.py:name."""
    resume: bool | str = False
    """Continue from the newest checkpoint in output_dir (true), or from the checkpoint at a path."""
    overwrite: bool = False
    """Replace what output_dir already holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is not None:
            if self.dataset is None:
                raise InputError("dataset: name the prompts to train on (a file, a directory or a hub name).")
            if self.reward_model is None and not self.reward:
                raise InputError(
                    "reward_model and reward are both missing: name at least one, such as --reward file.py:name."
                )
            return
        for name in ("tokenizer", "dataset", "eval_dataset", "reward_model", "reward", "reward_weights"):
            if getattr(self, name):
                raise InputError(
                    f"{name} is set but policy is not: name the model to train, or leave both out for the embedded data."
                )

    def training(self, **changes: Any) -> PPOTrainerConfig:
        """The trainer's own settings, without what the command adds."""
        return PPOTrainerConfig(**{f.name: getattr(self, f.name) for f in fields(PPOTrainerConfig)} | changes)


def train(config: PPORecipe) -> None:
    """The user's policy on the user's prompts and rewards."""
    rewards = [load_reward_function(name) for name in config.reward]
    trainer = PPOTrainer(
        config.policy,
        [*([config.reward_model] if config.reward_model else []), *rewards],
        config.dataset,
        config.training(),
        tokenizer=config.tokenizer,
        eval_dataset=config.eval_dataset,
    )
    trainer.train(resume=config.resume, overwrite=config.overwrite)
    print(
        f"the trained policy is in {config.output_dir}/policy; try it: python -m rlhf.sample {config.output_dir}/policy"
    )


def main(config: PPORecipe) -> None:
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    if config.policy is not None:
        train(config)
    else:
        import pipeline  # beside this file; it needs nothing that a user's own run needs

        pipeline.run(config)


def default_settings(arguments: list[str]) -> list[str]:
    """Without a policy or settings of the user's, those of the embedded task."""
    named = any(a.split("=")[0] in ("--policy", "--config", "--help", "-h", "--print_config") for a in arguments)
    return [] if named else [f"--config={Path(__file__).parent / 'configs' / 'ppo_embedded.yaml'}"]


if __name__ == "__main__":
    sys.argv[1:1] = default_settings(sys.argv[1:])
    run_command(PPORecipe, main, "PPO fine-tuning of a language model.")
