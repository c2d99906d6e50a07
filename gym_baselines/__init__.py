"""gym_baselines: the algorithms of `rlhf` on Gymnasium environments, where they can be validated in seconds.

from gym_baselines import PPO, evaluate
agent = PPO("CartPole-v1", seed=0).learn(100_000)
mean, std = evaluate(agent, episodes=100)
"""

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError("gym_baselines needs gymnasium: pip install 'rlhf-toolkit[gym]'") from error

from gym_baselines.agent import Agent
from gym_baselines.api import A2C, PPO, TRPO, PPOPenalty, Reinforce
from gym_baselines.callbacks import Evaluate, SaveEvery, StopAfter, StopAtReturn
from gym_baselines.collect import Collector
from gym_baselines.config import TrainConfig
from gym_baselines.envs.environments import EnvironmentConfig
from gym_baselines.evaluate import Evaluation, evaluate
from gym_baselines.networks import ActorCritic, NetworkConfig
from gym_baselines.presets import PRESETS, preset
from gym_baselines.train import train

__all__ = [
    "A2C",
    "PPO",
    "PRESETS",
    "TRPO",
    "ActorCritic",
    "Agent",
    "Collector",
    "EnvironmentConfig",
    "Evaluate",
    "Evaluation",
    "NetworkConfig",
    "PPOPenalty",
    "Reinforce",
    "SaveEvery",
    "StopAfter",
    "StopAtReturn",
    "TrainConfig",
    "evaluate",
    "preset",
    "train",
]
