"""Trainer for PPO on language models."""

from rlhf.algorithms.ppo import PPO
from rlhf.trainers.config import PPOTrainerConfig
from rlhf.trainers.trainer import Trainer


class PPOTrainer(Trainer):
    """PPO with a value head, a KL penalty towards the reference, and rewards from functions or models. See `Trainer`."""

    config: PPOTrainerConfig

    def make_algorithm(self) -> PPO:
        return PPO(self.config.ppo)
