"""A training run in float64, one process of a group: `python -m tests.gym_baselines.group_worker DIR`."""

import sys

import torch

from gym_baselines import TrainConfig, train
from rlhf.algorithms.ppo import PPOConfig
from rlhf.distributed import Distributed
from rlhf.update import UpdateConfig


def config(output_dir):
    """Nothing divides evenly: 5 environments on 2 processes, minibatches of 15 transitions, ghosts where episodes end."""
    return TrainConfig(
        total_steps=500,
        num_envs=5,
        rollout_steps=18,
        learning_rate=1e-2,
        ppo=PPOConfig(
            kl_coef=0.0,
            gamma=0.98,
            value_coef=0.5,
            entropy_coef=0.01,
            normalize_advantages="minibatch",
            anneal_clip=True,
        ),
        update=UpdateConfig(num_epochs=2, minibatch_size=15, max_grad_norm=0.5),
        output_dir=str(output_dir),
        progress_bar=False,
    )


def run(output_dir, distributed):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return train(config(output_dir), distributed=distributed)
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = Distributed()
    run(sys.argv[1], group)
    group.close()
