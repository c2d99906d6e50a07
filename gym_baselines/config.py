"""The settings of a training run, and the tuned ones of known environments."""

from dataclasses import dataclass, field, replace
from typing import Literal

from gym_baselines.environments import Autoreset
from rlhf.algorithms.ppo import PPOConfig
from rlhf.errors import InputError
from rlhf.update import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """PPO on a Gymnasium environment. Sizes are global: over all processes."""

    env: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    seed: int = 0
    """Decides everything random: weights, start states, actions, minibatches."""
    total_steps: int = 100_000
    """Environment steps to train for, over all environments; the rollout that reaches it is completed."""
    num_envs: int = 8
    """Environments played side by side."""
    rollout_steps: int = 128
    """Steps of each environment between two updates."""
    autoreset: Autoreset = "next_step"
    """How environments restart; both give the same transitions, next_step with a masked ghost step after each episode."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the policy network and of the value network."""
    learning_rate: float = 3e-4
    """Adam's learning rate at the start."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """Let the learning rate fall linearly to 0 over the run, or keep it."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            kl_coef=0.0, gamma=0.99, value_coef=1.0, value_clip_range=None, normalize_advantages="minibatch"
        )
    )
    """The algorithm's settings, here with control's usual defaults."""
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(num_epochs=10, minibatch_size=256, max_grad_norm=0.5)
    )
    """How a rollout becomes gradient steps; minibatch_size counts transitions."""
    output_dir: str | None = None
    """Folder for the trained agent and the metrics; nothing is written if null."""
    overwrite: bool = False
    """Replace a run that output_dir already holds."""
    progress_bar: bool = True
    """Show a progress bar on the terminal."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_envs", "rollout_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be above 0 and finite, got {self.learning_rate}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must lie in [0, 2**32), got {self.seed}.")
        if any(size < 1 for size in self.hidden_sizes):
            raise InputError(f"hidden_sizes must be 1 or more each, got {list(self.hidden_sizes)}.")
        if self.batch_size % self.update.minibatch_size:
            raise InputError(
                f"update.minibatch_size = {self.update.minibatch_size} does not divide the {self.batch_size} transitions "
                f"of a rollout (num_envs {self.num_envs} x rollout_steps {self.rollout_steps}): choose one that does."
            )
        if self.ppo.kl_coef > 0:
            raise InputError(
                f"ppo.kl_coef = {self.ppo.kl_coef} penalises the distance from a reference policy, and control "
                "tasks have none: set it to 0."
            )

    @property
    def batch_size(self) -> int:
        """Transitions of one rollout, ghosts included."""
        return self.num_envs * self.rollout_steps


PRESETS: dict[str, TrainConfig] = {
    # rl-zoo's tuned PPO for CartPole-v1 (hyperparams/ppo.yml of rl-baselines3-zoo, 22e3ff2): 500 in every run.
    # Its vf_coef 0.5 multiplies a squared error without our factor 0.5, hence value_coef 1.
    "CartPole-v1": TrainConfig(
        env="CartPole-v1",
        total_steps=100_000,
        num_envs=8,
        rollout_steps=32,
        learning_rate=1e-3,
        lr_schedule="linear",
        ppo=PPOConfig(
            kl_coef=0.0,
            gamma=0.98,
            gae_lambda=0.8,
            clip_range=0.2,
            anneal_clip=True,
            value_coef=1.0,
            value_clip_range=None,
            entropy_coef=0.0,
            normalize_advantages="minibatch",
        ),
        update=UpdateConfig(num_epochs=20, minibatch_size=256, max_grad_norm=0.5),
    ),
}


def preset(env: str, **changes: object) -> TrainConfig:
    """The tuned settings of an environment, or the general ones if it has none, with some changed by name."""
    return replace(PRESETS.get(env, TrainConfig(env=env)), **changes)  # type: ignore[arg-type]
