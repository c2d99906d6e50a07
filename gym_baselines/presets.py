"""Tuned settings for known environments, each with its source. A preset is only a set of values.

"zoo" is rl-baselines3-zoo's hyperparams/*.yml (commit 22e3ff2), tuned for Stable-Baselines3. Its vf_coef multiplies a
squared error without our factor 0.5, hence value_coef = 2 vf_coef; its batch_size is our minibatch_size, its `lin_x` is
our linear schedule.
"""

from typing import Any, get_args

from gym_baselines.config import ALIASES, AlgorithmName, TrainConfig, with_settings
from rlhf.algorithms.trpo import TrustRegionConfig
from rlhf.errors import InputError

Settings = dict[str, Any]

ALGORITHMS: dict[str, Settings] = {
    "ppo": {},
    # Schulman et al. 2017, section 4: no clip, but an adaptive penalty on the exact KL(old || policy).
    "ppo_penalty": {
        "surrogate": "unclipped",
        "penalty_coef": 1.0,
        "penalty_target": 0.01,
        "lr_schedule": "constant",
    },
    # Stable-Baselines3's A2C: PPO with one epoch over the whole rollout, the whole return, RMSprop (arXiv 2205.09123).
    "a2c": {
        "surrogate": "score",
        "rollout_steps": 5,
        "num_epochs": 1,
        "minibatch_size": None,
        "gae_lambda": 1.0,
        "normalize_advantages": "none",
        "optimizer": "rmsprop",
        "learning_rate": 7e-4,
        "lr_schedule": "constant",
    },
    # Williams 1992 with a learnt baseline; whole episodes and whole returns. The settings are ours.
    "reinforce": {
        "surrogate": "score",
        "whole_episodes": True,
        "num_envs": 2,
        "rollout_steps": 512,  # about one episode, so that few steps are carried over and become off-policy
        "num_epochs": 1,
        "minibatch_size": None,
        "gae_lambda": 1.0,
        "normalize_advantages": "batch",
        "learning_rate": 3e-3,
    },
    # sb3-contrib's defaults: a trust-region step for the policy, Adam over minibatches for the values.
    "trpo": {
        "trust_region": TrustRegionConfig(),
        "rollout_steps": 256,
        "num_epochs": 10,
        "minibatch_size": 128,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "normalize_advantages": "batch",
        "max_grad_norm": 1e9,
    },
}
"""Settings that define each algorithm, as changes to TrainConfig's defaults, which are those of PPO."""

_CARTPOLE: Settings = {"total_steps": 100_000, "gamma": 0.98}

_BOX2D: Settings = {  # zoo: LunarLander-v3 and LunarLanderContinuous-v3
    "total_steps": 1_000_000,
    "num_envs": 16,
    "rollout_steps": 1024,
    "minibatch_size": 64,
    "num_epochs": 4,
    "learning_rate": 3e-4,
    "lr_schedule": "constant",
    "gamma": 0.999,
    "gae_lambda": 0.98,
    "entropy_coef": 0.01,
}

_MUJOCO: Settings = {
    # zoo's mujoco-defaults (its Ant-v4): Stable-Baselines3's own defaults, with observations and rewards normalised.
    # The zoo has tuned settings for Hopper, HalfCheetah and Walker2d (1M steps); these are those that papers compare.
    "total_steps": 1_000_000,
    "num_envs": 1,
    "rollout_steps": 2048,
    "minibatch_size": 64,
    "num_epochs": 10,
    "learning_rate": 3e-4,
    "lr_schedule": "constant",
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "normalize_observations": True,
    "normalize_rewards": True,
}

_ATARI: Settings = {  # zoo: atari (10M steps, 40M frames)
    "atari": True,
    "frame_stack": 4,
    "shared_trunk": True,
    "total_steps": 10_000_000,
    "num_envs": 8,
    "rollout_steps": 128,
    "minibatch_size": 256,
    "num_epochs": 4,
    "learning_rate": 2.5e-4,
    "clip_range": 0.1,
    "anneal_clip": True,
    "entropy_coef": 0.01,
    "device": "auto",
}

PRESETS: dict[str, dict[str, Settings]] = {
    "CartPole-v1": {
        "ppo": {  # zoo, plus an entropy bonus: once all episodes are perfect, whitened advantages are noise, and
            # without the bonus one seed of ten unlearned the task
            **_CARTPOLE,
            "num_envs": 8,
            "rollout_steps": 32,
            "minibatch_size": 256,
            "num_epochs": 20,
            "learning_rate": 1e-3,
            "gae_lambda": 0.8,
            "anneal_clip": True,
            "entropy_coef": 0.01,
        },
        "ppo_penalty": {  # ours
            **_CARTPOLE,
            "num_envs": 8,
            "rollout_steps": 64,
            "minibatch_size": 256,
            "num_epochs": 10,
            "learning_rate": 1e-3,
            "gae_lambda": 0.8,
        },
        "a2c": {"total_steps": 500_000, "num_envs": 8, "lr_schedule": "linear"},  # zoo, with a falling learning rate
        "reinforce": {"total_steps": 500_000},
        "trpo": {  # zoo's batch, damping and value steps, but more and shorter rows: with its 2 x 512 steps and lambda
            # 0.98, two of four seeds ended at 370 and 420 (like one of five with Stable-Baselines3)
            "total_steps": 100_000,
            "num_envs": 8,
            "rollout_steps": 128,
            "minibatch_size": 512,
            "num_epochs": 20,
            "gae_lambda": 0.95,
            "damping": 1e-3,
        },
    },
    "Acrobot-v1": {
        "ppo": {  # zoo
            "total_steps": 1_000_000,
            "num_envs": 16,
            "rollout_steps": 256,
            "minibatch_size": 64,
            "num_epochs": 4,
            "gae_lambda": 0.94,
            "lr_schedule": "constant",
            "normalize_observations": True,
            "normalize_rewards": True,
        }
    },
    "MountainCar-v0": {
        "ppo": {  # zoo
            "total_steps": 1_000_000,
            "num_envs": 16,
            "rollout_steps": 16,
            "minibatch_size": 64,
            "num_epochs": 4,
            "gae_lambda": 0.98,
            "lr_schedule": "constant",
            "normalize_observations": True,
            "normalize_rewards": True,
        }
    },
    "Pendulum-v1": {
        "ppo": {  # ours, since the zoo's needs state-dependent exploration
            "total_steps": 100_000,
            "num_envs": 4,
            "rollout_steps": 1024,
            "minibatch_size": 64,
            "num_epochs": 10,
            "learning_rate": 1e-3,
            "gamma": 0.9,
            "gae_lambda": 0.95,
        }
    },
    "LunarLander-v3": {"ppo": _BOX2D},
    "LunarLanderContinuous-v3": {"ppo": _BOX2D},
    "BipedalWalker-v3": {
        "ppo": {  # zoo
            "total_steps": 5_000_000,
            "num_envs": 32,
            "rollout_steps": 2048,
            "minibatch_size": 64,
            "num_epochs": 10,
            "learning_rate": 3e-4,
            "lr_schedule": "constant",
            "clip_range": 0.18,
            "gamma": 0.999,
            "gae_lambda": 0.95,
            "normalize_observations": True,
            "normalize_rewards": True,
        }
    },
    "Hopper-v5": {"ppo": _MUJOCO},
    "HalfCheetah-v5": {"ppo": _MUJOCO},
    "Walker2d-v5": {"ppo": _MUJOCO},
    "Ant-v5": {"ppo": _MUJOCO},
    "ALE/Pong-v5": {"ppo": _ATARI},
    "ALE/Breakout-v5": {"ppo": _ATARI},
}
"""environment -> algorithm -> changes. Other environments get the algorithm's general settings."""


def preset(env: str = "CartPole-v1", algorithm: str = "ppo", **changes: Any) -> TrainConfig:
    """The tuned settings of an environment, or the algorithm's general ones if it has none, with `changes` by name."""
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithm must be one of {', '.join(get_args(AlgorithmName))}, got {algorithm!r}.")
    tuned = PRESETS.get(env, {}).get(algorithm, {})
    if env.startswith("ALE/") and not tuned:  # every game needs the Atari preparation, whatever the algorithm
        tuned = {"atari": True, "frame_stack": 4, "device": "auto", "total_steps": 10_000_000}
    changed = {ALIASES.get(name, name) for name in changes}
    kept = {name: value for name, value in (ALGORITHMS[algorithm] | tuned).items() if name not in changed}
    return with_settings(TrainConfig(env=env), algorithm=algorithm, **kept, **changes)


def is_tuned(env: str, algorithm: str) -> bool:
    return algorithm in PRESETS.get(env, {})
