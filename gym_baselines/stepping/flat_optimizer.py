"""The step of a torch.optim optimizer on flat vectors: one for all weights, and one for each moment.

For a dozen small tensors, an operation on one vector costs a twelfth of the operations on each. The state of
`torch.optim` stays authoritative: `load` fills the vectors from it and `store` writes them back, so checkpoints and the
optimizer's own `step` continue from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer, RMSprop

Moments = Sequence[Tensor]
Number = Tensor | float
"""A tensor in compiled graphs, where a float would become a constant; elsewhere a float, which is cheaper."""


def adam(
    weights: Tensor, gradient: Tensor, moments: Moments, count: Number, rate: Number, settings: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """One step of Adam (Kingma & Ba 2015, arXiv 1412.6980), with epsilon added to the corrected root, as in torch.

    Args:
        weights: All weights, as a vector.
        gradient: Their gradient.
        moments: Running means of the gradient and of its square.
        count: Number of this step, from 1.
        rate: Learning rate.
        settings: "betas" and "eps".

    Returns:
        New weights and moments.
    """
    beta1, beta2 = settings["betas"]
    mean = moments[0].lerp(gradient, 1 - beta1)
    square = (beta2 * moments[1]).addcmul(gradient, gradient, value=1 - beta2)
    correction = (1 - beta2**count) ** 0.5
    return weights - rate / (1 - beta1**count) * mean / (square.sqrt() / correction + settings["eps"]), [mean, square]


def rmsprop(
    weights: Tensor, gradient: Tensor, moments: Moments, count: Number, rate: Number, settings: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """One step of Hinton's RMSprop (Coursera lecture 6e) without momentum; epsilon is added to the root.

    Args:
        weights: All weights, as a vector.
        gradient: Their gradient.
        moments: Running mean of the squared gradient.
        count: Not used; here for the signature of `adam`.
        rate: Learning rate.
        settings: "alpha" and "eps".

    Returns:
        New weights and moments.
    """
    alpha = settings["alpha"]
    square = (alpha * moments[0]).addcmul(gradient, gradient, value=1 - alpha)
    return weights - rate * gradient / (square.sqrt() + settings["eps"]), [square]


@dataclass(frozen=True)
class Rule:
    """One kind of optimizer: the names of its moments in torch's state, its formula, and the options not supported."""

    moments: tuple[str, ...]
    formula: Callable[..., tuple[Tensor, list[Tensor]]]
    unsupported: tuple[str, ...]


RULES: dict[type[Optimizer], Rule] = {
    Adam: Rule(("exp_avg", "exp_avg_sq"), adam, ("weight_decay", "amsgrad", "maximize")),
    RMSprop: Rule(("square_avg",), rmsprop, ("weight_decay", "momentum", "centered", "maximize")),
}


def obstacle(optimizer: Optimizer) -> str | None:
    """Why `FlatOptimizer` cannot replace the optimizer's own step, and the remedy; None if it can."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        kinds = " and ".join(kind.__name__ for kind in RULES)
        return f"needs the arithmetic of torch.optim's {kinds}, not of {type(optimizer).__name__}: use one of them"
    if len(optimizer.param_groups) > 1:
        return "takes an optimizer with one group of parameters: merge the groups"
    (group,) = optimizer.param_groups
    for option in rule.unsupported:
        if group[option]:
            return f"does not know the optimizer's option {option} = {group[option]}: leave it out"
    types = sorted({str(p.dtype) for p in group["params"]})
    if len(types) > 1:
        return f"takes parameters of one type, not {types}: convert them"
    return None


class FlatOptimizer:
    """Flat vectors of the parameters and of the moments in `optimizer`, which must have no `obstacle`."""

    def __init__(self, parameters: Sequence[Parameter], optimizer: Optimizer) -> None:
        self.parameters: list[Tensor] = [*parameters]
        self.optimizer = optimizer
        self.rule = RULES[type(optimizer)]
        self.shapes = [p.shape for p in self.parameters]
        size = sum(p.numel() for p in self.parameters)
        self.weights = self.parameters[0].new_empty(size).detach()
        self.moments = [torch.empty_like(self.weights) for _ in self.rule.moments]
        self.count = self.weights.new_zeros((), dtype=torch.float64)
        """Steps made so far."""
        self._weight_pieces = self.unflatten(self.weights)
        self._pieces = [*self._weight_pieces, *[piece for vector in self.moments for piece in self.unflatten(vector)]]

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the only parameter group."""
        return self.optimizer.param_groups[0]

    @property
    def vectors(self) -> list[Tensor]:
        """The vectors that a step changes: (weights, *moments, count)."""
        return [self.weights, *self.moments, self.count]

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of the parts of a vector, in the shapes of the parameters."""
        pieces = vector.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @torch.no_grad()
    def load(self) -> bool:
        """Fill the vectors with the parameters and the optimizer's state.

        Returns False if the parameters have been stepped different numbers of times, since the vectors have one count.
        """
        self._create_state()
        counts = {float(step) for step in self._steps()}
        if len(counts) > 1:
            return False
        torch._foreach_copy_(self._pieces, self._stored())
        self.count.fill_(counts.pop())
        return True

    @torch.no_grad()
    def store(self) -> None:
        """Write the vectors back to where `load` took them from. If no step was ever made, delete the state instead."""
        if not self.count:
            for p in self.parameters:
                self.optimizer.state.pop(p)
            return
        torch._foreach_copy_(self._stored(), self._pieces)
        steps = self._steps()
        torch._foreach_copy_(steps, [self.count] * len(steps))

    def stepped(self, vectors: Sequence[Tensor], gradient: Tensor, count: Number, rate: Number) -> list[Tensor]:
        """The new (weights, *moments) after step number `count`; changes nothing in place."""
        weights, moments = self.rule.formula(vectors[0], gradient, vectors[1:], count, rate, self.settings)
        return [weights, *moments]

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Make a step, and copy the new weights to the parameters. gradient: a vector like `weights`."""
        self.count += 1
        changing = [self.weights, *self.moments]
        made = self.stepped(changing, gradient, self.count.item(), float(self.settings["lr"]))
        torch._foreach_copy_(changing, made)
        torch._foreach_copy_(self.parameters, self._weight_pieces)

    def _stored(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.parameters]
        return [*self.parameters, *[state[name] for name in self.rule.moments for state in states]]

    def _steps(self) -> list[Tensor]:
        return [self.optimizer.state[p]["step"] for p in self.parameters]

    def _create_state(self) -> None:
        """Let torch create its state by a first step, with gradients of 0 so that no parameter changes."""
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
