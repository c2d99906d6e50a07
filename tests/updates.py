"""One update on a batch, by a stepper of its own."""

from typing import Any

from rlhf.training.steppers import EagerStepper
from rlhf.training.update import make_stepper
from rlhf.training.update import update as update_with


def update(policy, algorithm, batch, optimizer, config, distributed, *, stepper: Any = EagerStepper, **options: Any):
    """`rlhf.training.update.update`, which takes a stepper in the optimizer's place."""
    made = make_stepper(policy, algorithm, optimizer, config, distributed, stepper)
    return update_with(policy, algorithm, batch, made, config, distributed, **options)
