"""Settings of rl-baselines3-zoo for Stable-Baselines3's algorithms, copied unchanged.

Source: hyperparams/{dqn,sac,ppo,a2c,trpo}.yml at commit 22e3ff2 (2026-04-23). Tests compare our presets with them, and
`compare` runs Stable-Baselines3 with them. `n_envs`, `n_timesteps`, `normalize` and "lin_x" (x, falling to 0) are the
zoo's own; the rest are arguments of the algorithm's class.
"""

from typing import Any

Settings = dict[str, Any]

_LANDER: Settings = {
    "n_timesteps": 1_000_000,
    "n_envs": 16,
    "n_steps": 1024,
    "batch_size": 64,
    "gae_lambda": 0.98,
    "gamma": 0.999,
    "n_epochs": 4,
    "ent_coef": 0.01,
}

_MUJOCO: Settings = {"n_timesteps": 1_000_000, "normalize": True}
"""The zoo's mujoco-defaults, used here for all robots. The zoo uses them only for Ant, and has tuned entries for
Hopper, HalfCheetah and Walker2d, which our presets do not follow either (see presets.py)."""

ZOO: dict[tuple[str, str], Settings] = {
    ("sb3_dqn", "CartPole-v1"): {
        "n_timesteps": 50_000,
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    },
    ("sb3_ppo", "CartPole-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": "lin_0.001",
        "clip_range": "lin_0.2",
    },
    ("sb3_a2c", "CartPole-v1"): {"n_timesteps": 500_000, "n_envs": 8, "ent_coef": 0.0},
    ("sb3_trpo", "CartPole-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 2,
        "n_steps": 512,
        "batch_size": 512,
        "cg_damping": 1e-3,
        "gae_lambda": 0.98,
        "gamma": 0.99,
        "learning_rate": 1e-3,
        "n_critic_updates": 20,
    },
    ("sb3_sac", "Pendulum-v1"): {"n_timesteps": 20_000, "learning_rate": 1e-3},
    ("sb3_ppo", "Pendulum-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 4,
        "n_steps": 1024,
        "gae_lambda": 0.95,
        "gamma": 0.9,
        "n_epochs": 10,
        "ent_coef": 0.0,
        "learning_rate": 1e-3,
        "clip_range": 0.2,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    ("sb3_a2c", "Pendulum-v1"): {
        "n_timesteps": 1_000_000,
        "normalize": True,
        "n_envs": 8,
        "n_steps": 8,
        "gae_lambda": 0.9,
        "gamma": 0.9,
        "ent_coef": 0.0,
        "vf_coef": 0.4,
        "max_grad_norm": 0.5,
        "use_rms_prop": True,
        "normalize_advantage": False,
        "learning_rate": "lin_7e-4",
        "use_sde": True,
        "policy_kwargs": {"log_std_init": -2, "ortho_init": False},
    },
    ("sb3_trpo", "Pendulum-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 2,
        "n_steps": 1024,
        "gamma": 0.9,
        "n_critic_updates": 15,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    ("sb3_ppo", "LunarLander-v3"): _LANDER,
    ("sb3_ppo", "LunarLanderContinuous-v3"): _LANDER,
    ("sb3_ppo", "Acrobot-v1"): {
        "n_timesteps": 1_000_000,
        "normalize": True,
        "n_envs": 16,
        "n_steps": 256,
        "gae_lambda": 0.94,
        "gamma": 0.99,
        "n_epochs": 4,
        "ent_coef": 0.0,
    },
    ("sb3_ppo", "MountainCar-v0"): {
        "n_timesteps": 1_000_000,
        "normalize": True,
        "n_envs": 16,
        "n_steps": 16,
        "gae_lambda": 0.98,
        "gamma": 0.99,
        "n_epochs": 4,
        "ent_coef": 0.0,
    },
    ("sb3_ppo", "BipedalWalker-v3"): {
        "n_timesteps": 5_000_000,
        "normalize": True,
        "n_envs": 32,
        "n_steps": 2048,
        "batch_size": 64,
        "gae_lambda": 0.95,
        "gamma": 0.999,
        "n_epochs": 10,
        "ent_coef": 0.0,
        "learning_rate": 3e-4,
        "clip_range": 0.18,
    },
    ("sb3_ppo", "Hopper-v5"): _MUJOCO,
    ("sb3_ppo", "HalfCheetah-v5"): _MUJOCO,
    ("sb3_ppo", "Walker2d-v5"): _MUJOCO,
    ("sb3_ppo", "Ant-v5"): _MUJOCO,
    ("sb3_a2c", "LunarLander-v3"): {
        "n_timesteps": 200_000,
        "n_envs": 8,
        "n_steps": 5,
        "gamma": 0.995,
        "learning_rate": "lin_0.00083",
        "ent_coef": 0.00001,
    },
    ("sb3_trpo", "LunarLander-v3"): {
        "n_timesteps": 200_000,
        "n_envs": 2,
        "n_steps": 512,
        "cg_damping": 0.01,
        "gae_lambda": 0.98,
        "gamma": 0.99,
        "learning_rate": 1e-3,
        "n_critic_updates": 15,
    },
}
"""(algorithm, environment) -> settings. For other pairs, `compare` uses the library's own defaults and says so."""
