"""GRPO on language models: the loop of trainer.py with groups of completions and without a value model."""

from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.algorithms.grpo import GRPO
from rlhf.errors import InputError
from rlhf.rollout.groups import length_metrics, nothing, sample_informative
from rlhf.rollout.scoring import Rollout
from rlhf.trainers.config import GRPOTrainerConfig
from rlhf.trainers.trainer import Trainer, as_list
from rlhf.verifiers import soft_overlong_punishment

FIELD_NAMES = {
    "score": "reward",
    "score_std": "reward_std",
    "zero_variance_fraction": "frac_reward_zero_std",
    "completion_length": "completions/mean_length",
    "completion_length_min": "completions/min_length",
    "completion_length_max": "completions/max_length",
    "completion_length_terminated": "completions/mean_terminated_length",
    "completion_length_right": "completions/mean_length_right",
    "completion_length_wrong": "completions/mean_length_wrong",
    "truncated_fraction": "completions/clipped_ratio",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "kl_loss": "kl",
    "sampler_gap": "sampling/sampling_logp_difference/max",
}
"""Our metrics under the names that users of GRPO trainers know, in files, trackers and callbacks."""


class GRPOTrainer(Trainer):
    """GRPO and its relatives: no value model, no reward model needed. See `Trainer` for the arguments.

    A completion on which all reward functions abstain (None) is left out; it is an error only if all of a step's do.
    """

    config: GRPOTrainerConfig
    algorithm: GRPO
    allow_unscored = True

    def __init__(self, policy: Any, rewards: Any, dataset: Any, config: GRPOTrainerConfig, **options: Any) -> None:
        grpo, rewards = config.grpo.with_length(config.generation.max_new_tokens), as_list(rewards)
        if grpo.overlong_buffer_tokens:
            weights = [1.0] * len(rewards) if config.reward_weights is None else config.reward_weights
            if len(weights) != len(rewards):
                raise InputError(f"reward_weights={weights}: give one number for each of {len(rewards)} rewards.")
            config = replace(config, reward_weights=[*weights, 1.0])
            rewards = [
                *rewards,
                soft_overlong_punishment(config.generation.max_new_tokens, grpo.overlong_buffer_tokens),
            ]
        super().__init__(GRPO(grpo), policy, rewards, dataset, config, **options)

    def _check_rewards(self) -> None:
        super()._check_rewards()
        name = self.config.grpo.dynamic_sampling_reward
        if name is not None and name not in self.rewards.names:
            raise InputError(
                f"grpo.dynamic_sampling_reward={name!r} is none of the rewards {', '.join(self.rewards.names)}. Name one "
                "of them, or leave it null for the first."
            )

    def train_step(self) -> dict[str, float]:
        return {FIELD_NAMES.get(name, name): value for name, value in super().train_step().items()}

    def evaluate(self) -> dict[str, float]:
        metrics = super().evaluate()
        return {f"eval/{FIELD_NAMES.get(name[5:], name[5:])}": value for name, value in metrics.items()}

    def _collect(self, cursor: int) -> tuple[Rollout, dict[str, float], int]:
        config, verdict = self.config, self._verdict
        if config.grpo.dynamic_sampling_rounds == 1:
            rollout, metrics, after = super()._collect(cursor)
            return rollout, metrics | length_metrics([rollout], verdict, self.distributed), after
        rollout, sampled, used = sample_informative(
            partial(self._round, cursor),
            count=config.prompts_per_step,
            rounds=config.grpo.dynamic_sampling_rounds,
            size=config.grpo.completions_per_prompt,
            verdict=verdict,
            distributed=self.distributed,
        )
        metrics = self.collector.metrics(*sampled) | length_metrics(sampled, verdict, self.distributed)
        extra = {"dynamic_sampling/rounds": float(len(sampled)), "dynamic_sampling/prompts": float(used)}
        return rollout, metrics | extra, cursor + used

    def _round(self, cursor: int, first: int, number: int) -> Rollout:
        """This process's share of one round of dynamic sampling."""
        if not self.distributed.share(number):
            return nothing(self.rewards.names, self.step)
        return self._sample(cursor + first, number, first_slot=first)

    @property
    def _verdict(self) -> str:
        """The reward that says whether a completion is right."""
        return self.config.grpo.dynamic_sampling_reward or self.rewards.names[0]
