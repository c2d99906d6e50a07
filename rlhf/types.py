"""The data that control tasks and language models share. A row is one environment or completion; time is its steps or
tokens.

Worked example, a language model (rows=2, time=3; "." is padding, <e> the end-of-sequence token that counts):

    actions        [[good  film  <e>], [bad   <e>   .  ]]
    mask           [[True  True  True], [True True False]]
    rewards        [[0     0     1.3 ], [0   -0.4   0   ]]   the score lies on the last token that counts
    values         V of the state *before* each token;  next_values[t] = values[t + 1], 0 after the end
    terminated     [[F     F     T   ], [F    T     F   ]]   and so episode_ends; a cut at the limit only the latter

and a control task with automatic resets one step late (NEXT_STEP; rows=1, time=4, an episode of 2 steps and its ghost):

    actions        [[1  0  *  1]]        mask          [[T  T  F  T]]     the ghost row's action was ignored
    rewards        [[1  1  0  1]]        terminated    [[F  F  F  F]]     the time limit cut it: truncated, not terminated
    episode_ends   [[F  T  F  F]]        next_values   [[V1 V2 *  V4]]    V2 is the value of the final observation
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""What the policy needs to score `actions`, opaque to the algorithms; every tensor has a leading row dimension."""

Metrics = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count); both are added over microbatches and processes before dividing."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What a collector fills and `Algorithm.prepare` reads; tensors are (rows, time), booleans where named so."""

    inputs: Inputs
    actions: Tensor
    """int64 tokens or discrete actions, or (rows, time, dimensions) for continuous ones."""
    mask: Tensor
    """bool, True = counts: the EOS token does; padding, tool tokens and ghost steps do not."""
    rewards: Tensor
    """Reward of each step, before any KL penalty."""
    sampling_logprobs: Tensor
    """Log-probs of the policy that really drew the actions, as it reported them."""
    old_logprobs: Tensor
    """Log-probs of the proximal policy (the learner's weights before the update), from the training forward."""
    values: Tensor
    next_values: Tensor
    """V of the state that truly follows each step; the collector knows it, the recursion never guesses."""
    terminated: Tensor
    """bool: the state after this step has no future, so nothing is bootstrapped."""
    episode_ends: Tensor
    """bool: terminated or truncated; what follows in the row is another episode (or nothing)."""
    ref_logprobs: Tensor | None = None
    old_distribution: Tensor | None = None
    """(rows, time, parameters) of the action distribution that old_logprobs belong to; control tasks alone."""
    row_tokens: Tensor
    """(rows,) int64: how many tokens (observations) the row occupies in the policy's forward; decides the microbatches."""
    row_index: Tensor
    """(rows,) int64: the row's place in the global batch, whichever process holds it."""
    scored: Tensor | None = None
    """(rows,) bool: False where no reward function gave a score; None: all have one. Algorithms that compare scores within
    a group leave such rows out."""
    policy_version: Tensor | None = None
    """(rows, time) int64: how many updates the policy that sampled each action had seen; None: all of them as many as the
    policy that is trained now."""

    def batch(self, **made: Any) -> "TrainingBatch":
        """The batch to train on: what it has in common with the trajectories, and what `Algorithm.prepare` made of them."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return TrainingBatch(**{**kept, **made})


@dataclass(frozen=True)
class Weighting:
    """How one loss term is averaged: sum over the minibatch of weight * loss, divided by the global sum of count."""

    weight: Tensor
    """(rows, time)"""
    count: Tensor
    """(rows,)"""


def token_mean(mask: Tensor, dtype: torch.dtype) -> Weighting:
    """Every element that counts weighs the same, over the whole optimizer step and all processes."""
    weight = mask.to(dtype)
    return Weighting(weight, weight.sum(-1))


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What `prepare` makes of trajectories and `loss` consumes. Tensors are (rows, time) or (rows,)."""

    inputs: Inputs
    actions: Tensor
    mask: Tensor
    old_logprobs: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    returns: Tensor | None = None
    old_values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_distribution: Tensor | None = None
    policy_version: Tensor | None = None
    row_tokens: Tensor
    row_index: Tensor
    weightings: dict[str, Weighting]
    """Per loss term ("policy", "value", "entropy"), the weight of each element and its share of the denominator."""
    coefficients: dict[str, float] = field(default_factory=dict)
    """Numbers of this step, such as an annealed clip range."""
    denominators: dict[str, Tensor] = field(default_factory=dict)
    """Per loss term, the global denominator of the current minibatch; `update` fills it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Global numbers that `prepare` already knows, such as the KL to the reference."""

    @property
    def rows(self) -> int:
        return self.actions.shape[0]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        """The batch with `function` applied to every tensor that has a row dimension."""
        return replace(self, **{f.name: _map(getattr(self, f.name), function) for f in fields(self) if f.name in _ROWS})

    def select(self, rows: Tensor | slice, *, time: int | None = None) -> "TrainingBatch":
        """The given rows, cut to the first `time` steps; inputs keep their width."""
        batch = self.map_rows(lambda tensor: tensor[rows])
        if time is None or time == batch.actions.shape[1]:
            return batch
        cut = {name: _map(getattr(batch, name), lambda tensor: tensor[:, :time]) for name in _TIMED}
        weightings = {name: Weighting(w.weight[:, :time], w.count) for name, w in batch.weightings.items()}
        return replace(batch, **cut, weightings=weightings)

    def flatten(self) -> "TrainingBatch":
        """Every element a row of its own, (rows * time, 1): control tasks, whose minibatches are sets of transitions.

        Call it after `prepare`, which needs the order of time. Inputs are laid out (rows, time, ...); each element keeps
        its weight and counts with it in the denominator, so that ghost steps weigh nothing. Row r, step t becomes row
        index row_index[r] * time + t.
        """
        rows, time = self.mask.shape

        def apart(tensor: Tensor) -> Tensor:
            return tensor.reshape(rows * time, 1, *tensor.shape[2:])

        steps = torch.arange(time, device=self.mask.device)
        return replace(
            self,
            **{name: _map(getattr(self, name), apart) for name in _TIMED},
            inputs={name: tensor.flatten(0, 1) for name, tensor in self.inputs.items()},
            row_tokens=self.row_tokens.new_ones(rows * time),
            row_index=(self.row_index.unsqueeze(1) * time + steps).flatten(),
            weightings={name: Weighting(apart(w.weight), w.weight.flatten()) for name, w in self.weightings.items()},
        )


_TIMED = (
    *("actions", "mask", "old_logprobs", "sampling_logprobs", "advantages", "returns", "old_values", "ref_logprobs"),
    *("old_distribution", "policy_version"),
)
_KEPT = (
    *("inputs", "actions", "mask", "old_logprobs", "sampling_logprobs", "ref_logprobs", "policy_version"),
    *("row_tokens", "row_index"),
)
_ROWS = (*_TIMED, "inputs", "row_tokens", "row_index", "weightings")


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Weighting):
        return Weighting(function(value.weight), function(value.count))
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class PolicyOutputs:
    """What one forward of the policy gives for a batch, (rows, time) each; None where the algorithm did not ask."""

    logprobs: Tensor
    values: Tensor | None = None
    entropy: Tensor | None = None
    distribution: Tensor | None = None
    """(rows, time, parameters) of the action distribution; control tasks alone."""
    kl: Tensor | None = None
    """KL(old || policy), exact, where the policy was given the old distribution."""
