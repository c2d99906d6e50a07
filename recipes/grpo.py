"""GRPO and related algorithms: train a language model on groups of its own completions and their rewards.

    accelerate launch recipes/grpo.py                                       # embedded task, offline, minutes on 2 cores
    accelerate launch recipes/grpo.py --config my_grpo.yaml --reward my_rewards.py:correct --reward my_rewards.py:format

Without `--policy` a small model learns to add (grpo_pipeline.py). Every setting of rlhf/trainers/config.py and
rlhf/algorithms/grpo.py works as `--name value` and in a YAML file; recipes/configs/ has some that are ready to use.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import transformers
from command import UserRun, embedded_by_default, say_where

from rlhf.algorithms.grpo import GRPOConfig
from rlhf.algorithms.presets import PRESETS
from rlhf.commands.cli import guard, parse
from rlhf.trainers.config import GRPOTrainerConfig
from rlhf.trainers.grpo import GRPOTrainer


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(UserRun, GRPOTrainerConfig):
    """Settings of the command: model, data and rewards (UserRun), and how to train (GRPOTrainerConfig)."""

    trainer_config = GRPOTrainerConfig

    preset: str | None = None
    """Start from a paper's settings: grpo, dr_grpo, dapo, gspo, cispo, rloo or reinforce_pp. Your own settings win."""
    output_dir: str = "runs/grpo"
    """Directory of this run, for checkpoints, metrics and the trained policy."""


def train(recipe: GRPORecipe) -> None:
    """GRPO on the user's model, prompts and rewards. `train` in ppo_rlhf.py spells out the loop of such a trainer."""
    rewards = recipe.rewards()
    tokenizer = recipe.load_tokenizer()
    trainer = GRPOTrainer(
        recipe.policy,
        rewards,
        recipe.rows("dataset", tokenizer),
        recipe.training(),
        tokenizer=tokenizer,
        eval_dataset=recipe.rows("eval_dataset", tokenizer),
        peft_config=recipe.lora.peft_config(),
    )
    trainer.train(resume=recipe.resume, overwrite=recipe.overwrite)
    if trainer.distributed.is_main:
        say_where(Path(recipe.output_dir) / "policy")


def main(config: GRPORecipe) -> None:
    transformers.utils.logging.disable_progress_bar()  # a run draws its own
    if config.policy is not None:
        train(config)
    else:
        import grpo_pipeline  # only here: a run on the user's own data does not need it

        grpo_pipeline.run(config.training(), lora=config.lora, resume=config.resume, overwrite=config.overwrite)


def settings(arguments: list[str]) -> GRPORecipe:
    """Parse the command line. A setting takes the user's value, else the preset's, else the default."""
    description = "GRPO fine-tuning of a language model."
    config = parse(GRPORecipe, arguments, description=description)
    if config.preset is None:
        return config
    GRPOConfig.preset(config.preset)  # refuses an unknown preset
    return parse(GRPORecipe, arguments, description=description, defaults={"grpo": PRESETS[config.preset]})


if __name__ == "__main__":
    with guard():
        main(settings([*embedded_by_default(sys.argv[1:], "grpo_embedded.yaml"), *sys.argv[1:]]))
