"""The data that control tasks and language models share. A row is one environment or completion; time is its steps or
tokens.

Worked example, a language model (rows=2, time=3; "." is padding, <e> the end-of-sequence token that counts):

    actions        [[good  film  <e>], [bad   <e>   .  ]]
    mask           [[True  True  True], [True True False]]
    rewards        [[0     0     1.3 ], [0   -0.4   0   ]]   the score lies on the last token that counts
    values         V of the state *before* each token;  next_values[t] = values[t + 1], 0 after the end
    terminated     [[F     F     T   ], [F    T     F   ]]   so is episode_ends; a cut sets only episode_ends

and a control task with automatic resets one step late (NEXT_STEP; rows=1, time=4, a 2-step episode and its ghost step):

    actions        [[1  0  *  1]]        mask          [[T  T  F  T]]     the ghost step's action was ignored
    rewards        [[1  1  0  1]]        terminated    [[F  F  F  F]]     the time limit cut it: truncated, not terminated
    episode_ends   [[F  T  F  F]]        next_values   [[V1 V2 *  V4]]    V2 is the value of the final observation
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""Inputs with which the policy scores `actions`, opaque to the algorithms; all tensors have a leading row dimension."""

Metrics = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count); both are added over microbatches and processes before dividing."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Filled by a collector and read by `Algorithm.prepare`; tensors are (rows, time) unless stated otherwise."""

    inputs: Inputs
    actions: Tensor
    """int64 tokens or discrete actions, or (rows, time, dimensions) for continuous ones."""
    mask: Tensor
    """bool: True where the element counts. The EOS token counts; padding, tool tokens and ghost steps do not."""
    rewards: Tensor
    """Reward of each step, before any KL penalty."""
    sampling_logprobs: Tensor
    """Log-probs of the policy that drew the actions, as the sampler reported them."""
    old_logprobs: Tensor
    """Log-probs of the proximal policy (the learner's weights before the update), from the training forward."""
    values: Tensor
    next_values: Tensor
    """V of the state that actually follows each step. The collector fills it; GAE does not infer it from `values`."""
    terminated: Tensor
    """bool: the state after this step has no future, so nothing is bootstrapped."""
    episode_ends: Tensor
    """bool: terminated or truncated; what follows in the row is another episode (or nothing)."""
    ref_logprobs: Tensor | None = None
    old_distribution: Tensor | None = None
    """(rows, time, parameters) of the action distribution that old_logprobs come from; control tasks only."""
    row_tokens: Tensor
    """(rows,) int64: how many tokens (observations) the row occupies in the policy's forward; determines the
    microbatches."""
    row_index: Tensor
    """(rows,) int64: the row's place in the global batch, whichever process holds it."""
    scored: Tensor | None = None
    """(rows,) bool: False where no reward function gave a score; None: every row has one. Algorithms that compare
    scores within a group leave out rows without a score."""
    policy_version: Tensor | None = None
    """(rows, time) int64: version (number of updates) of the policy that sampled each action; None: the current version
    for all."""

    def batch(self, **made: Any) -> "TrainingBatch":
        """The batch to train on: the fields that trajectories have too, and `made`, from `Algorithm.prepare`."""
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
    """Equal weight for every element that counts, over the whole optimizer step and all processes."""
    weight = mask.to(dtype)
    return Weighting(weight, weight.sum(-1))


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Made from trajectories by `prepare` and consumed by `loss`. Tensors are (rows, time) or (rows,)."""

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
    """Coefficients for this step, such as an annealed clip range."""
    denominators: dict[str, Tensor] = field(default_factory=dict)
    """Per loss term, the global denominator of the current minibatch; filled by `prepare_minibatch`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Global metrics from `prepare`, such as the KL to the reference."""

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
        """Makes every element a row, (rows * time, 1), for control tasks, whose minibatches are sets of transitions.

        Call it after `prepare`, which needs the time order. Inputs must be (rows, time, ...). Each element keeps its
        weight and adds it to the denominator, so that ghost steps count nothing. Step t of row r gets the row index
        row_index[r] * time + t.
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


@dataclass(frozen=True)
class Shard:
    """The rows of a tensor that this process holds."""

    rows: Tensor
    first: int
    """Index of the first of them in the whole tensor."""


@dataclass(frozen=True, kw_only=True)
class PolicyOutputs:
    """Outputs of one forward of the policy on a batch, (rows, time) each; None where the algorithm asks for none."""

    logprobs: Tensor
    values: Tensor | None = None
    entropy: Tensor | None = None
    distribution: Tensor | None = None
    """(rows, time, parameters) of the action distribution; control tasks only."""
    kl: Tensor | None = None
    """Exact KL(old || policy), if the policy was given the old distribution."""
