"""Settings of a training run on a language model. The string below a field documents it, also for command lines."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from rlhf.algorithms.grpo import GRPOConfig
from rlhf.algorithms.ppo import PPOConfig
from rlhf.errors import InputError
from rlhf.rewards.functions import SCORE_LIMIT
from rlhf.rollout.engine import GenerationConfig
from rlhf.rollout.sampled import MissingEOS
from rlhf.settings import check_types
from rlhf.training.update import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings that all algorithms share. Batch sizes are global: totals over all processes."""

    output_dir: str
    """Directory of this run: checkpoints, metrics and, at the end, the policy."""
    seed: int = 0
    """Seed of every random draw, 0 <= seed < 2**32."""
    total_steps: int = 100
    """Number of rollouts, each followed by update.num_epochs passes over it."""
    prompts_per_step: int = 64
    """Prompts per rollout."""
    learning_rate: float = 3e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 at the end of the run, or stays constant."""
    warmup_steps: int = 0
    """Rollouts over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" computes in bfloat16; the weights that are trained stay in float32."""
    frozen_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights that are not trained (reference, base of an adapter, reward models given as paths); "auto": as precision."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass, to save memory: about a quarter slower, results the same."""
    max_prompt_tokens: int = 512
    """Length limit of a prompt, in tokens."""
    prompt_too_long: Literal["error", "drop", "truncate_left"] = "error"
    """What to do with longer prompts; applied before training, and their number is printed."""
    missing_eos: MissingEOS = "keep"
    """Score of a completion cut by the length limit: keep it, replace it by missing_eos_value, or subtract that from it."""
    missing_eos_value: float | None = None
    """Score to replace with or to subtract; needed unless missing_eos is "keep"."""
    reward_weights: list[float] | None = None
    """One weight per reward; all 1 if null."""
    reward_timeout_s: float | None = 300.0
    """Seconds that one reward function may take for one process's completions of a step; null: no limit."""
    engine_timeout_s: float | None = 3600.0
    """Seconds that the engine may take for one process's completions of a step; null: no limit."""
    collective_timeout_s: float = 1800.0
    """Seconds that a process waits for the others, at the start and in every exchange, until the run ends with a message
    that names the one that hangs. Must exceed the longest that one may be behind, as in its slowest reward call."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    eval_every: int = 0
    """Steps between evaluations on eval_dataset; 0 evaluates at the end only."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 saves only one, after the last step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; older ones are deleted once a newer one is complete."""
    log_completions: int = 4
    """Number of completions of a step to write to completions.jsonl, with their scores."""
    log_completions_every: int = 1
    """Steps between writes to completions.jsonl."""
    tracker: str | None = None
    """Also log to "tensorboard", "wandb" or another tracker that Accelerate knows."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "total_steps",
            "prompts_per_step",
            "max_prompt_tokens",
            "keep_checkpoints",
            "log_completions_every",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay", "eval_every", "checkpoint_every", "log_completions"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("reward_timeout_s", "engine_timeout_s"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < float("inf"):
                raise InputError(f"{name}={seconds}: give seconds above 0, or null for no limit.")
        if not 0 < self.collective_timeout_s < 1e9:
            raise InputError(f"collective_timeout_s={self.collective_timeout_s}: give seconds above 0 (and below 1e9).")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must lie in [0, 2**32), got {self.seed}.")
        for weight in self.reward_weights or ():
            if not math.isfinite(weight):
                raise InputError(f"reward_weights={self.reward_weights}: give a finite number for each reward.")
        if self.missing_eos_value is not None and not abs(self.missing_eos_value) <= SCORE_LIMIT:
            raise InputError(
                f"missing_eos_value={self.missing_eos_value}: give a number of at most {SCORE_LIMIT:g} in size."
            )
        if self.missing_eos == "subtract" and not (self.missing_eos_value or 0) > 0:
            raise InputError(
                f'missing_eos_value={self.missing_eos_value}: with missing_eos="subtract", give a number above 0.'
            )
        if (self.missing_eos != "keep") != (self.missing_eos_value is not None):
            raise InputError(
                f"missing_eos={self.missing_eos!r} and missing_eos_value={self.missing_eos_value} do not go together: "
                'give a value for "replace" and "subtract", and none for "keep".'
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of `step`: a pure function, so that there is no scheduler to save."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        progress = step / self.total_steps
        fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return self.learning_rate * rise * fall[self.lr_schedule]

    @property
    def frozen_dtype(self) -> torch.dtype | None:
        """Type of the weights that are not trained; None: as they are."""
        choice = self.precision if self.frozen_precision == "auto" else self.frozen_precision
        return torch.bfloat16 if choice == "bfloat16" else None

    def is_due(self, every: int, step: int) -> bool:
        """Whether an action due every `every` steps (0: never) and after the last step is due after `step`."""
        done = step + 1
        return done == self.total_steps or (every > 0 and done % every == 0)


@dataclass(frozen=True, kw_only=True)
class PPOTrainerConfig(TrainerConfig):
    """Settings of a PPO run on a language model."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    critic_learning_rate: float | None = None
    """Peak learning rate of the critic's own weights; null: learning_rate."""
    critic_max_grad_norm: float | None = None
    """Gradient clipping of the critic's own weights by themselves; null: update.max_grad_norm, for a value head together
    with the policy."""
    critic_warmup_steps: int = 0
    """First steps in which only the critic's own weights learn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("critic_learning_rate", "critic_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0, or null, got {value}.")
        if not 0 <= self.critic_warmup_steps < self.total_steps:
            raise InputError(
                f"critic_warmup_steps={self.critic_warmup_steps} must be 0 or more, and leave some of total_steps="
                f"{self.total_steps} in which the policy learns."
            )


@dataclass(frozen=True, kw_only=True)
class GRPOTrainerConfig(TrainerConfig):
    """Settings of a GRPO run. `grpo=GRPOConfig.preset("dapo")` starts from a published recipe."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW. 1e-6 is usual for models of billions of parameters; smaller ones need more."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(num_epochs=1, minibatch_size=None))

    def __post_init__(self) -> None:
        super().__post_init__()
        grpo = self.grpo
        update = self.update
        completions = self.prompts_per_step * grpo.completions_per_prompt
        updates = update.num_epochs * (completions // (update.minibatch_size or completions))
        if grpo.surrogate == "score" and updates > 1:
            raise InputError(
                f"grpo.surrogate=score has no importance ratio, so that {updates} updates per rollout "
                f"(update.num_epochs={update.num_epochs}, update.minibatch_size={update.minibatch_size}) would be "
                "off-policy. Set num_epochs to 1 and minibatch_size to null, or the surrogate to clipped."
            )
        if grpo.overlong_buffer_tokens >= self.generation.max_new_tokens:
            raise InputError(
                f"grpo.overlong_buffer_tokens={grpo.overlong_buffer_tokens} must be below "
                f"generation.max_new_tokens={self.generation.max_new_tokens}. DAPO uses a fifth of it."
            )
        if grpo.overlong_buffer_tokens and self.missing_eos != "keep":
            raise InputError(
                f"missing_eos={self.missing_eos} and grpo.overlong_buffer_tokens={grpo.overlong_buffer_tokens} both punish "
                "length. Choose one of them."
            )
