"""Compiles an optimizer step as one graph: forward, loss, gradient, clipping and the optimizer's arithmetic together.

With small networks, nearly all the time of an update goes into launching operations, not into computing. Here each
minibatch is one call. Policy, loss and `prepare_minibatch` are the same code as in eager mode: they are traced once per
shape of the batch (`make_fx`, gradients by `torch.func.grad`), and TorchInductor compiles the trace to C++. Numbers
that change during a run (learning rate, clip range, penalty) are inputs of the graph, so they never cause a
recompilation.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Module
from torch.nn.functional import pad
from torch.optim import Optimizer

from gym_baselines.stepping.flat_optimizer import FlatOptimizer, obstacle
from rlhf.algorithms.base import Algorithm
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.training.steppers import Minibatch, Outcome, StopReason, forward, prepare_minibatch, trained_parameters
from rlhf.training.sums import MetricSums
from rlhf.types import PolicyOutputs, TrainingBatch, Weighting

Compiler = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]

_STOP_REASONS: tuple[StopReason | None, ...] = (None, "target_kl", "gradient")
"""The meaning of the graph's verdict, an index into this."""


def inductor(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile the graph to C++ for exactly these shapes. `cpp_wrapper` saves a third of a small step's time, by
    C++ between the kernels too."""
    from torch._inductor import compile as compile_graph  # imported here, since it takes seconds to load

    return compile_graph(graph, [*inputs], options={"cpp_wrapper": True})


class CompiledStepper:
    """Compiled optimizer steps for control tasks: one process, on the CPU, with Adam or RMSprop."""

    def __init__(
        self,
        policy: Module,
        algorithm: Algorithm,
        optimizer: Optimizer,
        distributed: Distributed,
        *,
        max_grad_norm: float,
        target_kl: float | None,
        microbatch_tokens: int,
        compiler: Compiler = inductor,
    ) -> None:
        """Check that this combination can be compiled.

        Args:
            policy: The policy to train.
            algorithm: Its loss is compiled.
            optimizer: Adam or RMSprop, with one group of parameters.
            distributed: Must have one process.
            max_grad_norm: Gradient norm above which gradients are clipped.
            target_kl: Stop the update if the KL of a minibatch exceeds 1.5 times this; None for no limit.
            microbatch_tokens: Most rows of a minibatch, which is never divided here.
            compiler: Makes a callable from a traced graph and example inputs.

        Raises:
            InputError: The combination cannot be compiled.
        """
        _check_usable(policy, optimizer, distributed)
        self.policy = policy
        self.algorithm = algorithm
        self.optimizer = optimizer
        self.compiler = compiler
        self.max_grad_norm = max_grad_norm
        self.target_kl = target_kl
        self.microbatch_tokens = microbatch_tokens
        self._parameters = dict(policy.named_parameters())
        self._buffers = _buffers(policy)
        self._trained: list[str] = []  # names of the parameters that get a gradient, as the first batch shows
        self._flat: FlatOptimizer | None = None
        self._rate = torch.zeros((), dtype=torch.float64)
        self._graphs: dict[Any, _Graph] = {}

    def run(
        self, batch: TrainingBatch, minibatches: Iterable[Minibatch], sums: MetricSums, only: str | None = None
    ) -> Outcome:
        batch, minibatches = self._evenly(batch, list(minibatches))
        flat = self._flat = self._flat or self._flatten(batch)
        if not flat.load():
            raise InputError(
                "compile needs parameters that were stepped equally often, and the optimizer's state says they were not: "
                "start with a new optimizer, or set compile to false."
            )
        self._rate.fill_(float(flat.settings["lr"]))
        try:
            return self._run(flat, batch, minibatches, sums)
        finally:
            flat.store()

    @torch.no_grad()
    def _run(
        self, flat: FlatOptimizer, batch: TrainingBatch, minibatches: list[Minibatch], sums: MetricSums
    ) -> Outcome:
        coefficients = batch.old_logprobs.new_tensor(list(batch.coefficients.values()))
        inputs = [*flat.vectors, self._rate, coefficients, *self._constants().values(), *tensors_of(batch)]
        inputs = [tensor.contiguous() for tensor in inputs]
        graph = self._graph_for(batch, inputs, minibatches[0])
        numbers: list[Tensor] = []
        stopped_by = None
        for rows in minibatches:
            row, verdict = graph.call(*inputs, *([] if rows is None else [rows]))
            numbers.append(row)
            stopped_by = _STOP_REASONS[int(verdict)]
            if stopped_by is not None:
                break
        graph.add_metrics(sums, numbers, steps := len(numbers) - (stopped_by is not None))
        return Outcome(steps, stopped_by)

    def _evenly(self, batch: TrainingBatch, minibatches: list[Minibatch]) -> tuple[TrainingBatch, list[Minibatch]]:
        """Pad batch and minibatches with rows of weight 0, so that few shapes occur, since each shape needs a graph.

        All minibatches get the size of the first, and the batch one of four sizes per power of two. Both sizes depend
        only on this batch, so that rounding is the same in a resumed and in an uninterrupted run.
        """
        if batch.actions.shape[1] != 1:
            raise InputError("compile is for control tasks, whose rows are single steps: set compile to false.")
        size = batch.rows if minibatches[0] is None else len(minibatches[0])
        if size > self.microbatch_tokens:
            raise InputError(
                f"compile computes a minibatch at once, and {size} rows are more than microbatch_tokens = "
                f"{self.microbatch_tokens}: raise that, lower minibatch_size, or set compile to false."
            )
        uneven = [rows for rows in minibatches if rows is not None and len(rows) < size]
        spare = batch.rows  # index of the first row of weight 0
        batch = pad_rows(batch, round_up(batch.rows + bool(uneven)))
        if not uneven:
            return batch, minibatches
        filled = [rows if rows is None else pad(rows, (0, size - len(rows)), value=spare) for rows in minibatches]
        return batch, filled

    def _flatten(self, batch: TrainingBatch) -> FlatOptimizer:
        trained = trained_parameters(self.policy, self.algorithm, batch)
        self._trained = list(trained)
        return FlatOptimizer(list(trained.values()), self.optimizer)

    def _constants(self) -> dict[str, Tensor]:
        """Tensors that a step uses but does not change: normaliser statistics, parameters without a gradient."""
        others = {name: p.detach() for name, p in self._parameters.items() if name not in self._trained}
        return others | {name: getattr(module, key) for name, module, key in self._buffers}

    def _graph_for(self, batch: TrainingBatch, inputs: list[Tensor], rows: Minibatch) -> "_Graph":
        """The graph for inputs of these shapes, compiled when they first occur."""
        inputs = inputs if rows is None else [*inputs, rows]
        kept = tuple(f.name for f in fields(batch) if getattr(batch, f.name) is not None)
        names = (tuple(batch.inputs), tuple(batch.weightings), tuple(batch.coefficients))
        key = (rows is None, kept, names, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._graphs:
            assert self._flat is not None
            self._graphs[key] = _Graph(self, self._flat, batch, inputs, has_rows=rows is not None)
        return self._graphs[key]


class _Graph:
    """One optimizer step on inputs of fixed shapes: *flat.vectors, rate, coefficients, *constants, *batch tensors[, rows].

    `call(*inputs)` updates the vectors in place, unless the verdict (an index into _STOP_REASONS) forbids the step. It
    returns (numbers, verdict). numbers holds sum and count of each metric and, last, the gradient norm.
    """

    def __init__(
        self, owner: CompiledStepper, flat: FlatOptimizer, batch: TrainingBatch, inputs: list[Tensor], *, has_rows: bool
    ) -> None:
        self.owner = owner
        self.flat = flat
        self.has_rows = has_rows
        self.template = batch
        self.constants = list(owner._constants())
        self.metrics: list[str] = []
        try:
            with torch.enable_grad():
                trace = make_fx(self._step, tracing_mode="fake")(*inputs)
            self.call = owner.compiler(trace, inputs)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"compile failed ({type(error).__name__}, see above). It needs a C++ compiler, Python's headers, and a "
                "policy that does not branch on numbers and keeps its tensors as parameters and buffers; or set compile to "
                "false."
            ) from error
        del self.template  # frees its memory

    def add_metrics(self, sums: MetricSums, numbers: list[Tensor], steps: int) -> None:
        """Add the numbers that the calls returned to `sums`; gradient norms only of the `steps` that were made."""
        table = torch.stack(numbers).double()
        parts = table[:, :-1].sum(0).unbind()
        sums.add(dict(zip(self.metrics, zip(parts[::2], parts[1::2], strict=True), strict=True)))
        if steps:
            sums.add({"grad_norm": (table[:steps, -1].sum(), table.new_tensor(float(steps)))})

    def _step(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        owner = self.owner
        flat = self.flat
        given = iter(inputs)
        vectors = [next(given) for _ in flat.vectors]
        rate, coefficients = next(given), next(given)
        constants = {name: next(given) for name in self.constants}
        named = dict(zip(self.template.coefficients, coefficients.unbind(), strict=True))
        batch = replace(self.template.map_rows(lambda _: next(given)), coefficients=named)  # type: ignore[arg-type]
        if self.has_rows:
            batch = batch.select(next(given))
        minibatch = prepare_minibatch(batch, owner.algorithm.whiten_minibatch)

        def loss(weights: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            tensors = constants | dict(zip(owner._trained, flat.unflatten(weights), strict=True))

            def policy(*args: Any, **kwargs: Any) -> PolicyOutputs:
                return functional_call(owner.policy, tensors, args, kwargs)

            loss = owner.algorithm.loss(forward(policy, owner.algorithm, minibatch), minibatch)
            self.metrics = list(loss.metrics)
            numbers = torch.stack([number.to(loss.total.dtype) for pair in loss.metrics.values() for number in pair])
            return loss.total, (numbers, loss.policy_kl[0] / minibatch.mask.sum())

        gradient, (numbers, kl) = grad(loss, has_aux=True)(vectors[0])
        norm = torch.linalg.vector_norm(gradient)
        clipped = gradient * (owner.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        verdict = torch.where(norm.isfinite(), 0, _STOP_REASONS.index("gradient"))
        if owner.target_kl is not None:
            verdict = torch.where(kl > 1.5 * owner.target_kl, _STOP_REASONS.index("target_kl"), verdict)
        *changing, count = vectors
        made = flat.stepped(changing, clipped, count + 1, rate)
        for vector, new in zip(vectors, [*made, count + 1], strict=True):
            vector.copy_(torch.where(verdict == 0, new, vector))
        return torch.cat([numbers, norm.unsqueeze(0)]), verdict


def _buffers(policy: Module) -> list[tuple[str, Module, str]]:
    """(full name, module, name in it) of each buffer. Not the tensor, since the module may replace it."""
    return [
        (f"{prefix}.{key}".lstrip("."), module, key)
        for prefix, module in policy.named_modules()
        for key, _ in module.named_buffers(recurse=False)
    ]


def tensors_of(batch: TrainingBatch) -> list[Tensor]:
    """All tensors with a row dimension, in the order of `map_rows`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map_rows(note)
    return found


def round_up(rows: int) -> int:
    """Round up to a number of the form (4, 5, 6 or 7) * 2^k; numbers up to 8 stay."""
    unit = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // unit) * unit


def pad_rows(batch: TrainingBatch, rows: int) -> TrainingBatch:
    """Pad the batch to `rows` rows with copies of its first row, masked and of weight 0."""
    if rows == batch.rows:
        return batch
    places = torch.arange(rows, device=batch.mask.device)
    real = places < batch.rows
    padded = batch.select(torch.where(real, places, 0))
    weightings = {
        name: Weighting(w.weight * real.unsqueeze(1), w.count * real) for name, w in padded.weightings.items()
    }
    return replace(padded, mask=padded.mask & real.unsqueeze(1), weightings=weightings)


def _check_usable(policy: Module, optimizer: Optimizer, distributed: Distributed) -> None:
    if distributed.world_size > 1:
        raise InputError(
            f"compile is for one process, and this run has {distributed.world_size}: start one, or set compile to false."
        )
    if reason := obstacle(optimizer):
        raise InputError(f"compile {reason}, or set compile to false.")
    devices = {p.device.type for p in policy.parameters()}
    if devices != {"cpu"}:
        raise InputError(f"compile is for the CPU, and the policy is on {sorted(devices)}: set compile to false.")
    name = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if shutil.which(name) is None:
        raise InputError(
            f"compile needs a C++ compiler, and there is no {name!r} on the PATH: install one (Debian: apt install g++; or "
            "name yours in the environment variable CXX), or set compile to false."
        )
