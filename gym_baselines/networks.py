"""Policies: what the collector asks for actions and `rlhf.update` for log-probs, values and entropy."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import Tensor, nn

from rlhf.core.logprobs import entropy, token_logprobs
from rlhf.core.random import invert_cdf
from rlhf.types import Inputs, PolicyOutputs


class CategoricalPolicy(nn.Module):
    """Discrete actions: separate tanh networks for the policy and the value function.

    Orthogonal initialisation with gain sqrt(2), 0.01 at the policy head (all actions start about equally likely) and 1 at
    the value head, biases 0 (Huang et al. 2022, "The 37 implementation details of PPO", core details 2 and 13).
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_actions: int,
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = prod(observation_shape)
        generator = torch.Generator().manual_seed(seed)
        self.policy_net = _mlp([width, *hidden_sizes, num_actions], 0.01, generator)
        self.value_net = _mlp([width, *hidden_sizes, 1], 1.0, generator)

    @property
    def dtype(self) -> torch.dtype:
        return self.value_net[-1].weight.dtype  # type: ignore[return-value]

    def forward(
        self, inputs: Inputs, actions: Tensor, with_values: bool = True, with_entropy: bool = False
    ) -> PolicyOutputs:
        """Scores `actions`, (rows, 1) int64, at inputs["observations"], (rows, ...); outputs are (rows, 1)."""
        observations = inputs["observations"].flatten(1)
        logits = self.policy_net(observations).unsqueeze(1)
        return PolicyOutputs(
            logprobs=token_logprobs(logits, actions),
            values=self.value_net(observations) if with_values else None,
            entropy=entropy(logits) if with_entropy else None,
        )

    def sample(self, observations: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and their log-probs, (rows,) each, from draws in [0, 1), (rows,) float64."""
        logits = self.policy_net(observations.flatten(1))
        actions = invert_cdf(logits, draws)
        return actions, token_logprobs(logits, actions)

    def greedy(self, observations: Tensor) -> Tensor:
        """The most likely action of each row, (rows,)."""
        return self.policy_net(observations.flatten(1)).argmax(-1)

    def values(self, observations: Tensor) -> Tensor:
        """V of each observation, (rows,)."""
        return self.value_net(observations.flatten(1)).squeeze(1)


def _mlp(sizes: Sequence[int], last_gain: float, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (width_in, width_out) in enumerate(pairwise(sizes)):
        last = number == len(sizes) - 2
        linear = nn.utils.skip_init(nn.Linear, width_in, width_out)  # no draw from the global generator
        nn.init.orthogonal_(linear.weight, last_gain if last else sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)
