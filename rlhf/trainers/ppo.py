"""PPO on language models."""

from typing import Any

from rlhf.algorithms.ppo import PPO
from rlhf.trainers.config import PPOTrainerConfig
from rlhf.trainers.trainer import Trainer


class PPOTrainer(Trainer):
    """PPO with a value head, a KL penalty towards the reference, and rewards from functions or models. See `Trainer`."""

    config: PPOTrainerConfig

    def __init__(self, policy: Any, rewards: Any, dataset: Any, config: PPOTrainerConfig, **options: Any) -> None:
        super().__init__(PPO(config.ppo), policy, rewards, dataset, config, **options)
