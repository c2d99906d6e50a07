"""Two completions of known numbers, and PPO made to use broken parts."""

from math import nan

import pytest
import torch

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.masking import local_sum
from rlhf.types import Trajectories

EXACT = {"rtol": 0, "atol": 1e-12}


T, F = True, False


def f64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def trajectories(**changes) -> Trajectories:
    """Two completions of 3 and 2 tokens; the score, 1 and 2, lies on the last token. Padding holds NaN where it may."""
    mask = torch.tensor([[T, T, T], [T, T, F]])
    last = torch.tensor([[F, F, T], [F, T, F]])
    values = f64([[0.5, 0.25, 0.75], [1.0, 0.5, nan]])
    fields = {
        "inputs": {"states": torch.zeros(2, 3, dtype=torch.int64)},
        "actions": torch.zeros(2, 3, dtype=torch.int64),
        "mask": mask,
        "rewards": f64([[0, 0, 1], [0, 2, 0]]),
        "sampling_logprobs": f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, nan]]),
        "old_logprobs": f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, nan]]),
        "ref_logprobs": f64([[-1.2, -1.4, -0.8], [-1.6, -1.0, nan]]),  # k1 = 0.2, 0.4, -0.2 and 0.6, 0
        "values": values,
        "next_values": f64([[0.25, 0.75, 0], [0.5, 0, nan]]),
        "terminated": last,
        "episode_ends": last,
        "row_tokens": torch.tensor([3, 2]),
        "row_index": torch.arange(2),
    }
    return Trajectories(**{**fields, **changes})


def prepare(config: PPOConfig, given: Trajectories | None = None, progress: float = 0.0, state=None):
    algorithm = PPO(config)
    return algorithm.prepare(
        given or trajectories(), progress, algorithm.initial_state() if state is None else state, local_sum
    )


def with_broken(function: str, check):
    """`check` as a function of a variant of `function` that PPO then uses."""

    def run(variant) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"rlhf.algorithms.ppo.{function}", variant)
            check()

    return run
