"""TRPO's step of bounded KL divergence: Fisher-vector products, conjugate gradient, step size and line search.

Schulman et al. 2015 (arXiv 1502.05477), appendix C. All functions work on flat vectors, which concatenate the elements
of all parameters. KL always means KL(old || policy) in nats, where old is the distribution before the step.
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
    """All elements of the tensors, in one new vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Inverse of `flatten`, in place: the parameters keep their storage, which optimizers and files may rely on."""
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view(parameter.shape))


def fisher_vector_product(
    mean_kl: Callable[[], Tensor], parameters: Sequence[Tensor], *, damping: float, all_sum: AllSum = local_sum
) -> Product:
    """v -> (F + damping I) v, where F is the Hessian of KL(old || policy) at policy = old: the Fisher matrix.

    mean_kl: returns this process's share of the mean KL, a scalar that can be differentiated twice. It is called once,
    and its graph is kept as long as the returned function. Each product takes one backward pass through the gradient
    and one `all_sum`, after which the damping is added.
    """
    gradient = flatten(torch.autograd.grad(mean_kl(), parameters, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        curved = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True, materialize_grads=True)
        return all_sum(flatten(curved)) + damping * vector

    return product


def conjugate_gradient(product: Product, b: Tensor, *, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """Solves H x = b approximately, with at most `iterations` products; the least-norm solution if H is singular.

    Stops once |b - H x|^2 <= tolerance |b|^2 (relative, so that the scale of b, hence of the advantages, does not
    matter), or once rounding leaves no positive curvature along the search direction. Residuals are orthogonalised
    explicitly: the recursion alone soon loses orthogonality, and rounding (another order of sums, another number of
    processes) would then decide the later iterations.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    residuals: list[Tensor] = []  # all earlier ones, normalised
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
    """sqrt(2 max_kl / s^T (F + damping I) s): to second order, KL along s is s^T F s / 2, so this step reaches max_kl.

    direction: s. curved: (F + damping I) s. Returns 0 if the curvature is not above 0 (no gradient, or rounding).
    """
    curvature = direction @ curved
    return torch.where(curvature > 0, (2 * max_kl / curvature).sqrt(), 0.0)


class LineSearch(NamedTuple):
    """Result of `line_search`; kl and gain are 0 if no step was accepted, with the old parameters restored."""

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
    """Moves the parameters by the first of step, decay step, decay^2 step, ... that meets both conditions.

    The conditions: KL(old || policy) <= max_kl, and an objective above `objective`; a number that is not finite meets
    neither. If no candidate meets them, or `evaluate` raises, the old parameters are restored bit for bit.

    Args:
        step: The full step, a flat vector.
        evaluate: Returns (objective, KL) at the current parameters.
        objective: The objective before the step.
        decay: Factor from one candidate to the next.
        max_backtracks: How often the step may be shortened.
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
