"""gym_baselines: the algorithms of `rlhf` on Gymnasium environments, where they are validated in seconds.

from gym_baselines import evaluate, preset, train
agent = train(preset("CartPole-v1", seed=0))
print(evaluate(agent.policy, "CartPole-v1"))
"""

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError("gym_baselines needs gymnasium: pip install 'rlhf-toolkit[gym]'") from error

from gym_baselines.agent import Agent
from gym_baselines.collect import Collector
from gym_baselines.config import PRESETS, TrainConfig, preset
from gym_baselines.evaluate import Evaluation, evaluate
from gym_baselines.train import train

__all__ = ["PRESETS", "Agent", "Collector", "Evaluation", "TrainConfig", "evaluate", "preset", "train"]
