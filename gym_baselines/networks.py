"""Policy and value networks: actions for the collector; log-probs, values, entropy and KL for the update."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gym_baselines.envs.spaces import action_family, check_spaces_supported, image_channels
from gym_baselines.layers import NatureCNN, Normalizer, hidden_layers, mlp
from rlhf.core.distributions import MASKED_LOGIT, Categorical, MultiCategorical, SquashedGaussian
from rlhf.errors import InputError
from rlhf.settings import check_types
from rlhf.types import Inputs, PolicyOutputs

Features = Callable[[gym.Space], nn.Module]
"""Makes, from an observation space, a module that maps observations (rows, *shape) to features (rows, width)."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The policy and value networks."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers. Not used if convolutions or a module of your own compute the features."""
    value_hidden_sizes: tuple[int, ...] | None = None
    """Widths of the value network's hidden layers; hidden_sizes if null."""
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"
    """Activation after each hidden layer; convolutions always use relu."""
    shared_trunk: bool = False
    """One network with two heads. Otherwise policy and values have a network each; convolutions are always shared."""
    squash: bool = False
    """Box actions are a + b tanh(u) with u Gaussian, so they stay within the bounds. Otherwise they are Gaussian, and
    clipped to the bounds only for the environment."""
    log_std_init: float = 0.0
    """Initial log of the Gaussian's standard deviation, which is learnt and does not depend on the observation."""
    encoder: Literal["auto", "mlp", "nature_cnn"] = "auto"
    """Type of the first layers; auto takes the Atari convolutions for images (bytes, 36 x 36 or more), else an MLP."""
    normalize_observations: bool = False
    """Shift and scale observations by their running mean and standard deviation, and clip them to +-10."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("hidden_sizes", "value_hidden_sizes"):
            sizes = getattr(self, name)
            if sizes is None and name == "value_hidden_sizes":
                continue
            if not isinstance(sizes, tuple | list) or not all(isinstance(size, int) and size >= 1 for size in sizes):
                raise InputError(f"{name} must be widths of layers, 1 or more each, such as (64, 64), got {sizes!r}.")
            object.__setattr__(self, name, tuple(sizes))
        if not -20 <= self.log_std_init <= 5:
            raise InputError(f"log_std_init must lie in [-20, 5] (usual: 0), got {self.log_std_init}.")
        if self.shared_trunk and self.value_hidden_sizes not in (None, self.hidden_sizes):
            raise InputError(
                "value_hidden_sizes belong to separate networks: set it to null, or shared_trunk to false."
            )


class ActorCritic(nn.Module):
    """Policy and value function, for Discrete, MultiDiscrete, MultiBinary or Box actions; see NetworkConfig.

    Orthogonal initialisation with gain sqrt(2), 0.01 at the policy head (all actions start about equally likely) and 1
    at the value head, biases 0 (Huang et al. 2022, "The 37 implementation details of PPO", core details 2 and 13).

    Methods take raw observations of any numeric type; scaling and normalising happen in here. Actions are counted from
    0 and unclipped, (rows,) int64 or (rows, parts); `env_actions` converts them for the environment. An action mask is
    (rows, choices) bool, True = allowed, with the choices of several parts one after the other; a forbidden choice has
    probability exactly 0. A row (or part) that allows nothing is treated as if it allowed everything, which is harmless
    after an episode's end, where no action follows. Callers must refuse such a mask anywhere else.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: NetworkConfig | None = None,
        *,
        seed: int = 0,
        features: Features | None = None,
    ) -> None:
        """Build the networks.

        Args:
            observation_space: Of one environment.
            action_space: Of one environment.
            config: Settings of the networks; the defaults if None.
            seed: Seed of the initial weights.
            features: Makes a module of your own, which replaces the hidden layers of both networks; the policy and
                value heads take its output.
        """
        super().__init__()
        self.config = config = config or NetworkConfig()
        check_spaces_supported(observation_space, action_space, squash=config.squash)
        self.observation_space, self.action_space = observation_space, action_space
        self.family = action_family(action_space, squash=config.squash)
        self.has_own_features = features is not None
        self.normalizer = _make_normalizer(observation_space) if config.normalize_observations else None
        self._num_states = int(observation_space.n) if isinstance(observation_space, Discrete) else None
        self._first_state = int(observation_space.start) if isinstance(observation_space, Discrete) else 0
        self._is_image = image_channels(observation_space) is not None

        generator = torch.Generator().manual_seed(seed)
        hidden = config.hidden_sizes
        value_hidden = hidden if config.value_hidden_sizes is None else config.value_hidden_sizes
        self.body: nn.Module | None = None  # layers shared by policy and values
        width = self._num_states or prod(observation_space.shape or ())
        self._flatten = features is None and not self._uses_cnn()
        if features is not None:
            self.body, width = self._own_body(features, seed)
        elif self._uses_cnn():
            self.body = NatureCNN(observation_space, generator)
            width = NatureCNN.width
        elif config.shared_trunk and hidden:
            self.body = nn.Sequential(*hidden_layers([width, *hidden], config.activation, generator))
            width = hidden[-1]
        if self.body is not None:
            hidden = value_hidden = ()
        outputs = self.family.num_params if self.family.is_discrete else self.family.num_params // 2
        self.policy_net = mlp([width, *hidden, outputs], config.activation, 0.01, generator)
        self.value_net = mlp([width, *value_hidden, 1], config.activation, 1.0, generator)
        log_std = torch.full((outputs,), float(config.log_std_init))
        self.log_std = None if self.family.is_discrete else nn.Parameter(log_std)
        # In a tuple, so that the module is not registered twice. Looking it up by index each time would be slow.
        self._value_head = (self.value_net[-1],)

    # ---- for learning ----

    def forward(
        self,
        inputs: Inputs,
        actions: Tensor,
        with_values: bool = True,
        with_entropy: bool = False,
        old_distribution: Tensor | None = None,
    ) -> PolicyOutputs:
        """Score actions for the update.

        Args:
            inputs: "observations", (rows, ...), and optionally "action_mask".
            actions: (rows, 1) or (rows, 1, parts).
            with_values: Compute values.
            with_entropy: Compute the entropy.
            old_distribution: Parameters of an old policy, to compute `kl`, KL(old || this one).

        Returns:
            Outputs of shape (rows, 1), and always `distribution`, (rows, 1, num_params).
        """
        features = self._features(inputs["observations"])
        params = self._params(features, inputs.get("action_mask")).unsqueeze(1)
        return PolicyOutputs(
            logprobs=self.family.logprobs(params, actions),
            values=self.value_net(features) if with_values else None,
            entropy=self.family.entropy(params) if with_entropy else None,
            distribution=params,
            kl=None if old_distribution is None else self.family.kl(old_distribution, params),
        )

    # ---- for acting ----

    def sample(self, observations: Tensor, draws: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sampled actions and their log-probs, (rows,). draws: uniform in [0, 1), (rows, num_draws) float64."""
        params = self._params(self._features(observations), action_mask)
        actions = self.family.sample(params, draws)
        return actions, self.family.logprobs(params, actions)

    def greedy(self, observations: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """The most likely action of each row; for a squashed Gaussian, the median."""
        return self.family.mode(self._params(self._features(observations), action_mask))

    def values(self, observations: Tensor) -> Tensor:
        """V of each observation, (rows,)."""
        return self.value_net(self._features(observations)).squeeze(1)

    def env_actions(self, actions: Tensor) -> np.ndarray:
        """Actions as the environment takes them, (rows, *action shape): in its numbering, shape, type and bounds."""
        space = self.action_space
        family = self.family
        numbers = actions.cpu().numpy()
        if isinstance(space, Discrete):
            return numbers + space.start if space.start else numbers
        if isinstance(family, SquashedGaussian):
            numbers = np.asarray(family.shift) + np.asarray(family.scale) * np.tanh(numbers)
        numbers = numbers.reshape(len(numbers), *(space.shape or ()))
        if isinstance(space, MultiDiscrete):
            return (numbers + space.start).astype(space.dtype, copy=False)
        if isinstance(space, MultiBinary):
            return numbers.astype(space.dtype)
        assert isinstance(space, Box)
        return np.clip(numbers.astype(space.dtype, copy=False), space.low, space.high)

    # ---- properties ----

    @property
    def dtype(self) -> torch.dtype:
        return self._value_head[0].weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._value_head[0].weight.device  # type: ignore[return-value]

    @property
    def shares_layers(self) -> bool:
        """Whether policy and values share parameters."""
        return self.body is not None

    @property
    def num_draws(self) -> int:
        """How many uniform numbers sampling one action takes."""
        return self.family.num_draws

    # ---- parts ----

    def _features(self, observations: Tensor) -> Tensor:
        """Raw observations -> inputs of the two heads (or of the separate networks), (rows, width)."""
        if self._num_states is not None:
            observations = one_hot(observations.long() - self._first_state, self._num_states)
        prepared = observations.to(self.dtype)
        if self._is_image:
            prepared = prepared / 255
        if self.normalizer is not None:
            prepared = self.normalizer(prepared)
        if self._flatten:
            prepared = prepared.flatten(1) if prepared.dim() > 1 else prepared.unsqueeze(1)
        return prepared if self.body is None else self.body(prepared)

    def _uses_cnn(self) -> bool:
        return self.config.encoder == "nature_cnn" or (self.config.encoder == "auto" and self._is_image)

    def _params(self, features: Tensor, action_mask: Tensor | None) -> Tensor:
        """The distribution's parameters, (rows, num_params)."""
        params = self.policy_net(features)
        if self.log_std is not None:
            params = torch.cat([params, self.log_std.expand_as(params)], -1)
        if action_mask is None:
            return params
        if not isinstance(self.family, Categorical | MultiCategorical):
            raise InputError(
                f"An action mask was given, but the action space {self.action_space} has no choices to mask."
            )
        return params.masked_fill(~action_mask, MASKED_LOGIT)

    def _own_body(self, features: Features, seed: int) -> tuple[nn.Module, int]:
        """The user's module and its output width. Initialised from `seed`, whatever the global generator's state."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            body = features(self.observation_space)
        if not isinstance(body, nn.Module):
            raise InputError(f"features must make a torch.nn.Module for an observation space, but it gave {body!r}.")
        shape = (self._num_states,) if self._num_states is not None else self.observation_space.shape or ()
        was_training = body.training
        try:
            with torch.no_grad():
                made: Any = body.eval()(torch.zeros(2, *shape))
        except Exception as error:
            raise InputError(f"features made a module that fails on observations (2, *{shape}): {error}") from error
        body.train(was_training)
        if not isinstance(made, Tensor) or made.dim() != 2 or len(made) != 2:
            found = tuple(made.shape) if isinstance(made, Tensor) else repr(made)
            raise InputError(f"features must give (rows, width); for 2 observations {shape} it gave {found}.")
        return body, made.shape[1]


def _make_normalizer(observations: gym.Space) -> Normalizer:
    if image_channels(observations) is not None or not isinstance(observations, Box):
        raise InputError(
            f"normalize_observations is for a Box of measured numbers, but observations are {observations}, which need no "
            "statistics: set it to false."
        )
    return Normalizer(observations.shape)
