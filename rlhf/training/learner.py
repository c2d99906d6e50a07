"""Trajectories -> new weights: the one object through which language models and control tasks learn."""

from collections.abc import Callable

import torch
from torch.nn import Module
from torch.optim import Optimizer

from rlhf.algorithms.base import Algorithm
from rlhf.distributed import Distributed
from rlhf.runs.checkpoint import Saved
from rlhf.training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from rlhf.training.sampler import Agreement, check_sampler
from rlhf.training.steppers import EagerStepper, Stepper
from rlhf.training.update import UpdateConfig, make_stepper, update
from rlhf.training.weights import load_named_tensors, named_tensors
from rlhf.types import TrainingBatch, Trajectories

Arrange = Callable[[TrainingBatch], TrainingBatch]


def completions(batch: TrainingBatch) -> TrainingBatch:
    """A minibatch is a set of rows: of completions."""
    return batch


class Learner:
    """Model, algorithm, optimizer and the processes that share them; made once per run.

    `learn` prepares advantages, gathers the global batch, checks that the policy that sampled is the one that trains, and
    updates. What the algorithm adapts is committed only when the step is done.
    """

    def __init__(
        self,
        policy: Module,
        algorithm: Algorithm,
        make_optimizer: Callable[[Module], Optimizer],
        config: UpdateConfig,
        distributed: Distributed,
        *,
        seed: int,
        agreement: Agreement,
        arrange: Arrange = completions,
        stepper: Callable[..., Stepper] = EagerStepper,
    ) -> None:
        """make_optimizer: of the policy's parameters. seed: decides the minibatches. agreement: how
        far the sampler may be from the policy. arrange: what makes the global batch
        one of minibatches' elements (control tasks: of single transitions). stepper: the class that makes optimizer steps.
        """
        self.policy, self.algorithm, self.config = policy, algorithm, config
        self.distributed, self.seed, self.agreement, self._arrange = distributed, seed, agreement, arrange
        self.own_optimizer = make_optimizer(policy)
        self.model, self.optimizer = distributed.prepare(policy, self.own_optimizer)
        self.stepper = make_stepper(self.model, algorithm, self.optimizer, config, distributed, stepper)
        self.algorithm_state = algorithm.initial_state()
        self.updates = 0
        """Steps learnt: the version of the policy."""
        self.updating = False
        """True while the weights belong to no version, and after an update that failed."""
        self.first_advantages = torch.zeros(0)
        """(rows,): the advantage of the first sampled element of each row of the last global batch."""

    @property
    def has_learnt(self) -> bool:
        """Whether the policy is no longer the one that was given."""
        return bool(self.own_optimizer.state)

    def learn(
        self, trajectories: Trajectories, *, step: int, progress: float, learning_rate: float
    ) -> dict[str, float]:
        """One rollout's update; its mean metrics, global.

        trajectories: this process's rows. step: the rollout's number, which decides the minibatches. progress: the share of
        the run that is done, for schedules. TrainingError, with the weights as they were, if the policy that sampled is not
        this one or numbers are not finite; if the gradient is not, some of the update's steps may have been made.
        """
        state = dict(self.algorithm_state)
        batch = self.algorithm.prepare(trajectories, progress, state, self.distributed.all_sum)
        batch = self.distributed.gather_batch(batch)
        metrics = check_sampler(batch, self.agreement, step)
        first = batch.mask.int().argmax(1, keepdim=True)
        self.first_advantages = batch.advantages.gather(1, first).squeeze(1)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.updating = True
        metrics |= update(
            self.model,
            self.algorithm,
            self._arrange(batch),
            self.stepper,
            self.config,
            self.distributed,
            seed=self.seed,
            step=step,
            state=state,
        )
        self.algorithm_state, self.updates, self.updating = state, self.updates + 1, False
        return metrics | {"learning_rate": learning_rate}

    def state(self, step: int) -> Saved | None:
        """Everything that the first `step` steps left behind (random draws leave nothing); None if the weights are not
        those after `step` steps."""
        if self.updating or self.updates != step:
            return None
        tensors, optimizer_state = optimizer_tensors(self.own_optimizer, self.policy.named_parameters())
        values = {"algorithm": self.algorithm_state, "optimizer": optimizer_state, "updates": self.updates}
        return Saved(values, {"policy": named_tensors(self.policy), "optimizer": tensors})

    def load(self, saved: Saved) -> None:
        """Continue exactly where `state` was taken. InputError if it is of another model or optimizer."""
        load_named_tensors(self.policy, saved.tensors["policy"])
        load_optimizer_tensors(
            self.own_optimizer,
            self.policy.named_parameters(),
            saved.tensors["optimizer"],
            saved.values["optimizer"],
            keep={"weight_decay"},
        )
        adapts = self.algorithm.initial_state()  # a coefficient that has got a target since begins at its setting
        self.algorithm_state = {name: saved.values["algorithm"].get(name, value) for name, value in adapts.items()}
        self.updates = saved.values["updates"]
        self.updating = False
