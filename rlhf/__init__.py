"""rlhf: RLHF fine-tuning for language models on verified cores.

Names are imported on first use, so that `import rlhf.core` needs torch alone and a script pays only for what it touches.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PPOTrainer": "rlhf.trainer",
    "PPOTrainerConfig": "rlhf.trainer",
    "GRPOTrainer": "rlhf.grpo_trainer",
    "GRPOTrainerConfig": "rlhf.config",
    "Trainer": "rlhf.trainer",
    "Callback": "rlhf.trainer",
    "PPO": "rlhf.algorithms.ppo",
    "PPOConfig": "rlhf.algorithms.ppo",
    "GRPO": "rlhf.algorithms.grpo",
    "GRPOConfig": "rlhf.algorithms.grpo",
    "UpdateConfig": "rlhf.update",
    "GenerationConfig": "rlhf.generation",
    "RewardModel": "rlhf.reward_model",
    "isolated": "rlhf.rewards",
    "InputError": "rlhf.errors",
    "TrainingError": "rlhf.errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
