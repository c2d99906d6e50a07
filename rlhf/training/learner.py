"""The learner, which turns trajectories into new weights, for language models and control tasks alike."""

import math
from collections.abc import Callable

import torch
from torch.nn import Module
from torch.optim import Optimizer

from rlhf.algorithms.base import Algorithm
from rlhf.distributed import Distributed
from rlhf.errors import InputError, excerpt
from rlhf.lifeline import phase
from rlhf.runs.checkpoint import ANOTHER, Saved
from rlhf.training.optimizer_state import check_optimizer_tensors, load_optimizer_tensors, optimizer_tensors
from rlhf.training.sampler import Agreement, check_sampler
from rlhf.training.steppers import EagerStepper, Stepper, values_only
from rlhf.training.update import UpdateConfig, make_stepper, update
from rlhf.training.weights import check_named_tensors, fingerprint, load_named_tensors, trained_tensors
from rlhf.types import TrainingBatch, Trajectories

Arrange = Callable[[TrainingBatch], TrainingBatch]


def completions(batch: TrainingBatch) -> TrainingBatch:
    """The batch unchanged: minibatches are sets of its rows, the completions."""
    return batch


def _has_frozen(policy: Module) -> bool:
    return not all(parameter.requires_grad for parameter in policy.parameters())


class Learner:
    """Model, algorithm, optimizer and the processes that share them; made once per run.

    `learn` prepares advantages, gathers the global batch, checks that the policy that sampled is the one that trains,
    and updates. The state that the algorithm adapts is stored only when the update is complete.
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
        critic_warmup_steps: int = 0,
    ) -> None:
        """Makes the optimizer and the stepper.

        Args:
            make_optimizer: Makes the optimizer of the policy's parameters.
            seed: Determines the minibatches.
            agreement: How far the sampler's log-probs may be from the policy's.
            arrange: Turns the rows of the global batch into those of minibatches (control tasks: single transitions).
            stepper: The class that makes the optimizer steps.
            critic_warmup_steps: First steps in which the optimizer's group "critic" alone learns.
        """
        self.policy = policy
        self.algorithm = algorithm
        self.config = config
        self.distributed = distributed
        self.seed = seed
        self.agreement = agreement
        self._arrange = arrange
        self.critic_warmup_steps = critic_warmup_steps
        self.base = fingerprint(policy, of=lambda p: not p.requires_grad) if _has_frozen(policy) else None
        """Fingerprint of the weights that are not trained, which checkpoints leave out; None: all are trained."""
        self.model, self.optimizer = distributed.layout.train(policy, make_optimizer)
        self.own_optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without the processes' wrapper
        self.stepper = make_stepper(self.model, algorithm, self.optimizer, config, distributed, stepper)
        self.algorithm_state = algorithm.initial_state()
        self.updates = 0
        """Number of updates made: the version of the policy."""
        self.updating = False
        """True during an update and after one that failed: the weights then belong to no version."""
        self.first_advantages = torch.zeros(0)
        """(rows,): the advantage of each row's first sampled element, in the last global batch."""

    @property
    def has_learnt(self) -> bool:
        """Whether the policy's weights have been updated since it was given."""
        return bool(self.own_optimizer.state)

    @property
    def adapted(self) -> list[str]:
        """Lines about the values that have adapted so far, and with which a resumed run goes on, whatever its settings."""
        begins = self.algorithm.initial_state()
        return [
            f"{name} goes on at {value:g}, as adapted so far"
            for name, value in self.algorithm_state.items()
            if value != begins[name]
        ]

    @phase("update")
    def learn(
        self, trajectories: Trajectories, *, step: int, progress: float, learning_rate: float
    ) -> dict[str, float]:
        """Updates the policy on one rollout; returns the update's mean metrics, global.

        trajectories: this process's rows. step: the rollout's number, which determines the minibatches. progress: the
        share of the run that is done, for schedules. Raises TrainingError, and leaves the weights unchanged, if another
        policy sampled or numbers are not finite; if a gradient is not finite, earlier optimizer steps of this update
        remain applied.
        """
        if step != self.updates:
            raise InputError(
                f"learn(step={step}): the policy has learnt {self.updates} steps, so that only step {self.updates} can be "
                "next. In a run, train() alone calls train_step()."
            )
        state = dict(self.algorithm_state)
        batch = self.algorithm.prepare(trajectories, progress, state, self.distributed.all_sum)
        batch = self.distributed.gather_batch(batch)
        metrics = check_sampler(batch, self.agreement, step)
        first = batch.mask.int().argmax(1, keepdim=True)
        self.first_advantages = batch.advantages.gather(1, first).squeeze(1)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        warm = step < self.critic_warmup_steps
        if warm:
            batch = values_only(batch)
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
            only="critic" if warm else None,
        )
        self.algorithm_state = state
        self.updates += 1
        self.updating = False
        return metrics | {"learning_rate": learning_rate}

    def state(self, step: int) -> Saved | None:
        """The state after the first `step` steps (random draws have none); None if the weights are not those after
        `step` steps."""
        if self.updating or self.updates != step:
            return None
        tensors, optimizer_state = optimizer_tensors(self.own_optimizer, self.policy.named_parameters())
        values = {
            "algorithm": self.algorithm_state,
            "base": self.base,
            "optimizer": optimizer_state,
            "updates": self.updates,
        }
        stored = self.distributed.layout.stored
        return Saved(values, {"policy": stored(trained_tensors(self.policy)), "optimizer": stored(tensors)})

    def check(self, saved: Saved, step: int | None = None) -> None:
        """Raises InputError unless `saved` is a `state` of this model and optimizer, after `step` steps if given.

        At most one group of tensors is in memory.
        """
        updates = saved.count("updates")
        if step not in (None, updates):
            raise InputError(f"state.json: updates is {updates}, but the checkpoint is of step {step}. {ANOTHER}")
        for name, value in saved.value("algorithm", dict).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"state.json: {name} is {excerpt(value)}, not a finite number. {ANOTHER}")
        if saved.values.get("base") != self.base:
            raise InputError(
                "The checkpoint holds only the weights that are trained, and was made on other frozen weights than the "
                "policy has now. Resume with the base model that the run was started with."
            )
        optimizer = saved.value("optimizer", dict)
        check_named_tensors(self.policy, saved.tensors["policy"])
        named = self.policy.named_parameters()
        check_optimizer_tensors(self.own_optimizer, named, saved.tensors["optimizer"], optimizer)

    def load(self, saved: Saved) -> None:
        """Restores a `state`, to continue exactly from there. InputError, before anything changes, if it does not fit."""
        self.check(saved)
        like = self.distributed.layout.like
        load_named_tensors(self.policy, saved.tensors["policy"], like)
        load_optimizer_tensors(
            self.own_optimizer,
            self.policy.named_parameters(),
            saved.tensors["optimizer"],
            saved.values["optimizer"],
            keep={"weight_decay", "lr_scale", "max_grad_norm"},
            like=like,
        )
        adapts = self.algorithm.initial_state()  # a coefficient without a saved value starts at its setting
        self.algorithm_state = {name: saved.values["algorithm"].get(name, value) for name, value in adapts.items()}
        self.updates = saved.values["updates"]
        self.updating = False
