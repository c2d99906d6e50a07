"""PPO fine-tuning of a language model against a reward model or reward functions.

    accelerate launch recipes/ppo_rlhf.py                                   # embedded data, offline, minutes on 2 cores
    accelerate launch recipes/ppo_rlhf.py --policy runs/sft --dataset prompts.jsonl \\
        --reward my_rewards.py:polite --output_dir runs/mine --learning_rate 1e-5

Without `--policy` the whole of RLHF runs on embedded data (pipeline.py): SFT, reward model, PPO, evaluation.
Every setting of rlhf/trainers/config.py works as `--name value` and in a YAML file given with `--config`.
"""

import sys
from dataclasses import dataclass

from command import UserRun, embedded_by_default, train

from rlhf.commands.cli import run_command
from rlhf.trainers.config import PPOTrainerConfig
from rlhf.trainers.ppo import PPOTrainer


@dataclass(frozen=True, kw_only=True)
class PPORecipe(UserRun, PPOTrainerConfig):
    """Settings of the command: what to train on what, and how (PPOTrainerConfig)."""

    trainer_config = PPOTrainerConfig

    output_dir: str = "runs/ppo_rlhf"
    """Directory of this run: checkpoints, metrics, and in the end the policy."""


def main(config: PPORecipe) -> None:
    if config.policy is not None:
        train(config, PPOTrainer)
    else:
        import pipeline  # beside this file; it needs nothing that a user's own run needs

        pipeline.run(config.training(), resume=config.resume, overwrite=config.overwrite)


if __name__ == "__main__":
    sys.argv[1:1] = embedded_by_default(sys.argv[1:], "ppo_embedded.yaml")
    run_command(PPORecipe, main, "PPO fine-tuning of a language model.")
