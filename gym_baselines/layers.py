"""Building blocks of networks: layers with PPO's initialisation, Atari convolutions, observation normalisation."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from gym_baselines.envs.spaces import image_channels
from rlhf.core.masking import AllSum, local_sum
from rlhf.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
_LIMIT = 10.0  # normalised observations are clipped to +- this


def mlp(sizes: Sequence[int], activation: str, last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers of these widths, with activations between them. last_gain: initialisation gain of the last one."""
    hidden = hidden_layers(sizes[:-1], activation, generator)
    return nn.Sequential(*hidden, _linear(sizes[-2], sizes[-1], last_gain, generator))


def hidden_layers(sizes: Sequence[int], activation: str, generator: torch.Generator) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [_linear(width_in, width_out, sqrt(2), generator), ACTIVATIONS[activation]()]
    return layers


def _linear(width_in: int, width_out: int, gain: float, generator: torch.Generator) -> nn.Module:
    return _initialised(nn.utils.skip_init(nn.Linear, width_in, width_out), gain, generator)


def _initialised(layer: Any, gain: float, generator: torch.Generator) -> nn.Module:
    """Set orthogonal weights, drawn from `generator` and not from the global one, and biases 0."""
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class NatureCNN(nn.Module):
    """Three convolutions and a linear layer of 512 (Mnih et al. 2015, Nature 518), for images scaled to [0, 1]."""

    width = 512

    def __init__(self, observations: gym.Space, generator: torch.Generator) -> None:
        super().__init__()
        place = image_channels(observations)
        if place is None:
            raise InputError(
                f"encoder = 'nature_cnn' is for pictures, a Box of bytes with at most 16 channels and at least 36 x 36 "
                f"pixels, but observations are {observations}: set encoder to 'mlp' or 'auto', or give your own features."
            )
        shape = observations.shape or ()
        channels, height, width = shape if place == 0 else (shape[2], *shape[:2])
        self._channels_last = place == 2
        layers: list[nn.Module] = []
        for outputs, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            convolution = nn.utils.skip_init(nn.Conv2d, channels, outputs, kernel, stride)
            layers += [_initialised(convolution, sqrt(2), generator), nn.ReLU()]
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            channels = outputs
        linear = nn.utils.skip_init(nn.Linear, channels * height * width, self.width)
        self.layers = nn.Sequential(*layers, nn.Flatten(), _initialised(linear, sqrt(2), generator), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations.permute(0, 3, 1, 2) if self._channels_last else observations)


class Normalizer(nn.Module):
    """(x - mean) / sqrt(var + 1e-8), clipped to +-10; before the first update, x clipped to +-10.

    Only `update`, called once per rollout, changes the statistics, so that acting, learning and evaluation use the same
    function (Huang et al. 2022, "The 37 implementation details of PPO", robotics details 6 and 7). They are buffers:
    saved with the weights.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("var", torch.ones(*shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, observations: Tensor) -> Tensor:
        """(rows, *shape) -> the same."""
        return ((observations - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-_LIMIT, _LIMIT)

    @torch.no_grad()
    def update(self, observations: Tensor, mask: Tensor, all_sum: AllSum = local_sum) -> None:
        """Add all processes' observations, (rows, time, *shape), where `mask`, (rows, time), to the statistics.

        Moments are computed in float64 in two passes and merged with the old ones (Chan, Golub and LeVeque 1983), so
        the result does not depend on how rows are distributed over processes.
        """
        flat = observations.double().flatten(0, 1)
        counted = mask.flatten()
        counts = counted.view(-1, *[1] * (flat.dim() - 1))
        count = all_sum(counted.sum().double())
        if count == 0:
            return
        mean = all_sum(torch.where(counts, flat, 0.0).sum(0)) / count
        squares = all_sum((torch.where(counts, flat - mean, 0.0) ** 2).sum(0))
        before = self.count.double()
        shift = mean - self.mean.double()
        total = before + count
        merged = self.var.double() * before + squares + shift**2 * (before * count / total)
        self.mean += (shift * (count / total)).to(self.mean.dtype)
        self.var.copy_(merged / total)
        self.count += count.long()
