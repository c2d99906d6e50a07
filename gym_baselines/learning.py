"""The parts that training on control tasks passes to the `Learner`, and the schedule of a run."""

from collections.abc import Callable

from torch import nn
from torch.optim import Adam, Optimizer, RMSprop

from gym_baselines.config import TrainConfig
from gym_baselines.stepping.flat import FlatStepper
from rlhf.errors import InputError, excerpt
from rlhf.runs.checkpoint import ANOTHER, Saved
from rlhf.training.sampler import Agreement
from rlhf.training.steppers import Stepper
from rlhf.types import TrainingBatch

AGREEMENT = Agreement(
    bound=1e-3, remedy="The policy must be a pure function of the observation: no dropout, no batch statistics."
)
"""How closely the log-probs of acting and training must agree: both use the same policy in the same precision."""


class Schedule:
    """The environment steps over which learning rate and clip range fall; saved in the run's checkpoints."""

    def __init__(self, start: int, planned: int) -> None:
        self.start = start
        self.planned = planned
        self.end = start + planned

    def progress(self, steps: int) -> float:
        """The share of the run that is done after `steps` environment steps in all."""
        return (steps - self.start) / (self.end - self.start)

    def state(self, step: int) -> Saved:
        return Saved({"steps": [self.start, self.end]})

    def load(self, saved: Saved) -> None:
        steps = saved.value("steps", list)
        if [type(number) for number in steps] != [int, int] or not 0 <= steps[0] <= steps[1]:
            raise InputError(f"state.json: steps is {excerpt(steps)}, not the first and the last step. {ANOTHER}")
        self.start, end = steps
        self.end = max(end, self.start + self.planned)  # a resumed run may be given more steps


def make_optimizer(config: TrainConfig, policy: nn.Module) -> Optimizer:
    """Adam or RMSprop over all parameters; TRPO's policy parameters never get a gradient from it."""
    if config.optimizer == "rmsprop":
        return RMSprop(policy.parameters(), lr=config.learning_rate, alpha=0.99, eps=config.optimizer_eps)
    return Adam(policy.parameters(), lr=config.learning_rate, eps=config.optimizer_eps, fused=True)


def stepper_of(config: TrainConfig) -> Callable[..., Stepper]:
    """The class that makes the optimizer's steps."""
    if not config.compile:
        return FlatStepper
    from gym_baselines.stepping.compiled import CompiledStepper  # here, since few runs load the compiler

    return CompiledStepper


def transitions(batch: TrainingBatch) -> TrainingBatch:
    """Each transition as a row. Ghost steps are kept with weight 0, so that all batches have the same size."""
    return batch.flatten()


def real_transitions(batch: TrainingBatch) -> TrainingBatch:
    """Each real transition as a row, without the padding that fills whole episodes up to the longest."""
    batch = batch.flatten()
    return batch.select(batch.mask.squeeze(1))
