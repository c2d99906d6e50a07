"""A torch.optim optimizer's step on vectors: all weights as one, each moment as one.

For a dozen small tensors, one operation on a vector costs a twelfth of one on each. `torch.optim` keeps the truth: vectors
are filled from its state by `load` and written back by `store`, so its checkpoints and its own `step` go on from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer, RMSprop

from rlhf.errors import InputError

Moments = Sequence[Tensor]


def adam(
    weights: Tensor, gradient: Tensor, moments: Moments, count: Tensor, rate: Tensor, settings: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """New weights and moments. count: this step's number, from 1; it and `rate` are float64 scalars.

    Kingma & Ba 2015 (arXiv 1412.6980), with epsilon added to the corrected root, as torch does.
    """
    beta1, beta2 = settings["betas"]
    mean = beta1 * moments[0] + (1 - beta1) * gradient
    square = beta2 * moments[1] + (1 - beta2) * gradient * gradient
    step_size = (rate / (1 - beta1**count)).to(weights.dtype)
    correction = (1 - beta2**count).sqrt().to(weights.dtype)
    return weights - step_size * mean / (square.sqrt() / correction + settings["eps"]), [mean, square]


def rmsprop(
    weights: Tensor, gradient: Tensor, moments: Moments, count: Tensor, rate: Tensor, settings: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """As `adam`, for Hinton's RMSprop (Coursera lecture 6e) without momentum; epsilon is added to the root."""
    square = settings["alpha"] * moments[0] + (1 - settings["alpha"]) * gradient * gradient
    return weights - rate.to(weights.dtype) * gradient / (square.sqrt() + settings["eps"]), [square]


@dataclass(frozen=True)
class Rule:
    """One kind of optimizer: its moments' names in torch's state, its arithmetic, and which options that leaves out."""

    moments: tuple[str, ...]
    formula: Callable[..., tuple[Tensor, list[Tensor]]]
    unsupported: tuple[str, ...]


RULES: dict[type[Optimizer], Rule] = {
    Adam: Rule(("exp_avg", "exp_avg_sq"), adam, ("weight_decay", "amsgrad", "maximize")),
    RMSprop: Rule(("square_avg",), rmsprop, ("weight_decay", "momentum", "centered", "maximize")),
}


def check_flattenable(optimizer: Optimizer) -> None:
    """InputError if `FlatOptimizer` does not know the optimizer's arithmetic, or its parameters fit no common vector."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        kinds = " and ".join(kind.__name__ for kind in RULES)
        raise InputError(
            f"compile knows the arithmetic of torch.optim's {kinds}, not of {type(optimizer).__name__}: use one of them, "
            "or set compile to false."
        )
    if len(optimizer.param_groups) > 1:
        raise InputError(
            "compile takes an optimizer with one group of parameters: merge the groups, or set compile to false."
        )
    (group,) = optimizer.param_groups
    for option in rule.unsupported:
        if group[option]:
            raise InputError(
                f"compile does not know the optimizer's option {option} = {group[option]}: leave it out, or set compile "
                "to false."
            )
    types = {str(p.dtype) for p in group["params"]}
    if len(types) > 1:
        raise InputError(
            f"compile takes parameters of one type, not {sorted(types)}: convert them, or set compile to false."
        )


class FlatOptimizer:
    """Vectors of the given parameters and of what `optimizer` keeps about them."""

    def __init__(self, parameters: Sequence[Parameter], optimizer: Optimizer) -> None:
        check_flattenable(optimizer)
        self.parameters, self.optimizer, self.rule = list(parameters), optimizer, RULES[type(optimizer)]
        self.shapes = [p.shape for p in self.parameters]
        size = sum(p.numel() for p in self.parameters)
        self.weights = self.parameters[0].new_empty(size).detach()
        self.moments = [torch.empty_like(self.weights) for _ in self.rule.moments]
        self.count = self.weights.new_zeros((), dtype=torch.float64)
        """Steps made so far."""
        self.rate = self.weights.new_zeros((), dtype=torch.float64)
        self._pieces = [piece for vector in (self.weights, *self.moments) for piece in self.unflatten(vector)]

    @property
    def settings(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of the vector's parts, in the parameters' shapes."""
        pieces = vector.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @torch.no_grad()
    def load(self) -> None:
        """Fill the vectors with the parameters, the optimizer's state and its learning rate."""
        self._create_state()
        counts = {float(step) for step in self._steps()}
        if len(counts) > 1:
            raise InputError(
                f"compile needs parameters that were stepped equally often, and the optimizer has made {sorted(counts)} "
                "steps with them: start with a new optimizer, or set compile to false."
            )
        torch._foreach_copy_(self._pieces, self._stored())
        self.count.fill_(counts.pop())
        self.rate.fill_(float(self.settings["lr"]))

    @torch.no_grad()
    def store(self) -> None:
        """Write the vectors back to where `load` took them from."""
        torch._foreach_copy_(self._stored(), self._pieces)
        steps = self._steps()
        torch._foreach_copy_(steps, [self.count] * len(steps))

    def stepped(self, vectors: Sequence[Tensor], gradient: Tensor, rate: Tensor) -> list[Tensor]:
        """What one step makes of `vectors` = (weights, *moments, count); changes nothing itself."""
        weights, *moments, count = vectors
        weights, moments = self.rule.formula(weights, gradient, moments, count + 1, rate, self.settings)
        return [weights, *moments, count + 1]

    @property
    def vectors(self) -> list[Tensor]:
        return [self.weights, *self.moments, self.count]

    def _stored(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.parameters]
        return [*self.parameters, *[state[name] for name in self.rule.moments for state in states]]

    def _steps(self) -> list[Tensor]:
        return [self.optimizer.state[p]["step"] for p in self.parameters]

    def _create_state(self) -> None:
        """The state that torch makes in its first step: let it make one, whose gradient 0 moves nothing."""
        missing = [p for p in self.parameters if not self.optimizer.state.get(p)]
        if not missing:
            return
        gradients = [p.grad for p in self.settings["params"]]
        for p in self.settings["params"]:
            p.grad = None
        for p in missing:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for p in missing:
            self.optimizer.state[p]["step"].zero_()
        for p, gradient in zip(self.settings["params"], gradients, strict=True):
            p.grad = gradient
