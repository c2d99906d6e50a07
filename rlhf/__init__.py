"""rlhf: fine-tuning of language models by RLHF.

Names are imported on first use, so that `import rlhf.core` needs only torch and a script loads only what it uses.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PPOTrainer": "rlhf.trainers.ppo",
    "PPOTrainerConfig": "rlhf.trainers.config",
    "GRPOTrainer": "rlhf.trainers.grpo",
    "GRPOTrainerConfig": "rlhf.trainers.config",
    "Trainer": "rlhf.trainers.trainer",
    "Callback": "rlhf.runs.callbacks",
    "PPO": "rlhf.algorithms.ppo",
    "PPOConfig": "rlhf.algorithms.ppo",
    "GRPO": "rlhf.algorithms.grpo",
    "GRPOConfig": "rlhf.algorithms.grpo",
    "UpdateConfig": "rlhf.training.update",
    "GenerationConfig": "rlhf.rollout.engine",
    "RewardModel": "rlhf.rewards.model",
    "isolated": "rlhf.rewards.calls",
    "InputError": "rlhf.errors",
    "TrainingError": "rlhf.errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
