"""Training runs in float64, one process of a group: `python -m tests.gym_baselines.group_worker DIR`."""

import sys
from pathlib import Path

import torch

from gym_baselines import preset, train
from rlhf.distributed import Distributed

COMMON = {"num_envs": 5, "rollout_steps": 18, "total_steps": 500, "progress_bar": False, "checkpoint_every": None}
"""Nothing divides evenly: 5 environments on 2 processes, ghosts where episodes end."""
ALGORITHMS = {
    "ppo": {"num_epochs": 2, "minibatch_size": 15, "learning_rate": 1e-2, "gamma": 0.98, "entropy_coef": 0.01},
    "ppo_penalty": {"num_epochs": 3, "minibatch_size": 15, "penalty_adapts": "epoch"},
    "a2c": {},
    "reinforce": {"baseline": "none"},
    "trpo": {"num_epochs": 2, "minibatch_size": 30},
}
HOPPER = {"normalize_observations": True, "normalize_rewards": True, "total_steps": 600}
CASES = {
    f"{env}-{algorithm}": (env, algorithm, {**COMMON, **changes, **(HOPPER if env == "Hopper-v5" else {})})
    for env in ("CartPole-v1", "Hopper-v5")
    for algorithm, changes in ALGORITHMS.items()
}


def run(output_dir, distributed):
    """Every case, each in a folder of its name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name, (env, algorithm, settings) in CASES.items():
            train(preset(env, algorithm, **settings, output_dir=str(Path(output_dir) / name)), distributed=distributed)
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = Distributed()
    run(sys.argv[1], group)
    group.close()
