"""Short runs of the real trainers in both worlds, language models and control tasks, that can be stopped and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gym_baselines import preset
from gym_baselines.agent import WEIGHTS_FILE
from gym_baselines.config import with_settings
from gym_baselines.train import Training
from rlhf import Callback
from tests import tiny

STEPS = 4
ROOT = Path(__file__).parents[2]


class World:
    """A short run of 4 steps in one of the two worlds, which can be stopped and resumed."""

    weights_file: str

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = ()) -> Any:
        """Train to the end; the trainer."""
        raise NotImplementedError

    def left(self, folder: Path) -> dict[str, bytes]:
        """What a finished run leaves."""
        return {name: (folder / name).read_bytes() for name in ("metrics.jsonl", self.weights_file)}


class Tokens(World):
    weights_file = "policy/model.safetensors"

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = ()) -> Any:
        settings = {"total_steps": STEPS, "ppo": {"kl_target": 0.5, "kl_horizon": 40}, "callbacks": callbacks}
        trainer = tiny.trainer(folder, lm=tiny.causal_lm(num_hidden_layers=1), **settings)
        trainer.train(resume=resume)
        return trainer


class Control(World):
    weights_file = WEIGHTS_FILE

    def start(self, folder: Path, *, resume: bool = False, callbacks: Any = (), eval_every: int | None = None) -> Any:
        config = preset(
            "CartPole-v1",
            "ppo_penalty",
            num_envs=4,
            rollout_steps=16,
            total_steps=STEPS * 64 - 40,  # ghost steps do not count
            num_epochs=2,
            minibatch_size=None,
            lr_schedule="linear",
            checkpoint_every=None,
            eval_every=eval_every,
            progress_bar=False,
            output_dir=str(folder),
        )
        training = Training(with_settings(config, resume=resume))
        try:
            training.train(callbacks)
        finally:
            training.close()
        return training


WORLDS = [pytest.param(Tokens(), id="tokens"), pytest.param(Control(), id="control")]


class Breaks(Exception):
    pass


class At(Callback):
    """Does something when a step has ended."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, trainer, step, metrics):
        if step == self.step:
            self.action(trainer)


def breaks(trainer: Any) -> None:
    raise Breaks


def fails_at(step: int, error: BaseException):
    """A method in whose place the `step`-th call fails, and the others do what it did."""

    def wrap(method):
        calls = []

        def failing(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == step:
                raise error
            return method(self, *args, **kwargs)

        return failing

    return wrap
