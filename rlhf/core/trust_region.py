"""A step of bounded KL divergence: Fisher-vector products, conjugate gradient, step size and line search (TRPO).

Schulman et al. 2015 (arXiv 1502.05477), appendix C. Everything works on flat vectors: the parameters' elements one after
the other. With old = the distribution before the step, KL always means KL(old || policy), in nats.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.core.masking import AllSum, local_sum

Product = Callable[[Tensor], Tensor]
"""v -> H v for a symmetric positive semi-definite H; flat vectors of one length."""


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A new vector of all elements."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """The inverse of `flatten`, in place: the parameters keep their storage, which optimizers and files may rely on."""
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view(parameter.shape))


def fisher_vector_product(
    mean_kl: Callable[[], Tensor], parameters: Sequence[Tensor], *, damping: float, all_sum: AllSum = local_sum
) -> Product:
    """v -> (F + damping I) v, where F is the Hessian of KL(old || policy) at policy = old: the Fisher matrix.

    mean_kl: this process's share of the mean KL, a scalar that can be differentiated twice; it is called once, and its
    graph lives as long as the product. Each product is one backward pass through the gradient and one `all_sum`; the
    damping is added after it, once.
    """
    gradient = flatten(torch.autograd.grad(mean_kl(), parameters, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        curved = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True, materialize_grads=True)
        return all_sum(flatten(curved)) + damping * vector

    return product


def conjugate_gradient(product: Product, b: Tensor, *, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """x with H x = b, as far as `iterations` products go; where H is singular, the solution of least norm.

    Stops once |b - H x|^2 <= tolerance |b|^2 (relative, so that the scale of b, hence of the advantages, does not
    matter), or where rounding makes the curvature along the search direction vanish. Residuals are kept orthogonal
    explicitly: by the recursion alone they soon are not, and rounding (another order of sums, another number of
    processes) would decide the later iterations.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    residuals: list[Tensor] = []  # so far, of length 1
    squared = residual @ residual
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        curved = product(direction)
        curvature = direction @ curved
        if curvature <= 0:
            break
        alpha = squared / curvature
        x = x + alpha * direction
        residuals.append(residual / squared.sqrt())
        residual = residual - alpha * curved
        for earlier in residuals:
            residual = residual - (earlier @ residual) * earlier
        before, squared = squared, residual @ residual
        direction = residual + (squared / before) * direction
    return x


def step_size(direction: Tensor, curved: Tensor, *, max_kl: float) -> Tensor:
    """sqrt(2 max_kl / s^T (F + damping I) s): along s, KL is s^T F s / 2 to second order, so this step reaches max_kl.

    direction: s. curved: (F + damping I) s. 0 where there is no direction to go (no gradient, or rounding left a
    curvature that is not above 0).
    """
    curvature = direction @ curved
    return torch.where(curvature > 0, (2 * max_kl / curvature).sqrt(), 0.0)


class LineSearch(NamedTuple):
    """What `line_search` found; kl and gain are 0 if nothing was accepted, since the parameters are the old ones."""

    accepted: bool
    backtracks: int
    kl: float
    gain: float


def line_search(
    parameters: Sequence[Tensor],
    step: Tensor,
    evaluate: Callable[[], tuple[float, float]],
    *,
    objective: float,
    max_kl: float,
    decay: float,
    max_backtracks: int,
) -> LineSearch:
    """Moves the parameters by the first of step, decay step, decay^2 step, ... that keeps both promises.

    The promises: KL(old || policy) <= max_kl and an objective above `objective`, the one before the step; a number that is
    not finite keeps none. evaluate: (objective, KL) at the current parameters. If no candidate does, or evaluate raises,
    the old parameters are put back, bit for bit.
    """
    old = flatten(parameters).detach()
    accepted = False
    try:
        for backtracks in range(max_backtracks + 1):
            assign(parameters, old + decay**backtracks * step)
            value, kl = evaluate()
            gain = value - objective
            accepted = isfinite(gain) and isfinite(kl) and kl <= max_kl and gain > 0
            if accepted:
                return LineSearch(True, backtracks, kl, gain)
        return LineSearch(False, max_backtracks, 0.0, 0.0)
    finally:
        if not accepted:
            assign(parameters, old)
