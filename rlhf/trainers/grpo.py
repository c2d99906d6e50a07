"""Trainer for GRPO on language models: groups of completions in place of a value model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from rlhf.algorithms.grpo import GRPO
from rlhf.errors import InputError
from rlhf.rollout.groups import DynamicSampling
from rlhf.rollout.prompts import PromptSource
from rlhf.trainers.config import GRPOTrainerConfig, TrainerConfig
from rlhf.trainers.inputs import Reward
from rlhf.trainers.trainer import Trainer
from rlhf.training.source import Source
from rlhf.verifiers import soft_overlong_punishment


class GRPOTrainer(Trainer):
    """Trains with GRPO or a variant; needs neither value model nor reward model. See `Trainer` for the arguments.

    A completion on which all reward functions abstain (None) is left out; InputError if none of a step has a score.
    """

    config: GRPOTrainerConfig
    allow_unscored = True
    metric_names: ClassVar[Mapping[str, str]] = {
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
        "sampler_gap_mean": "sampling/sampling_logp_difference/mean",
    }
    """Names that users of other GRPO trainers know; used in files, trackers and callbacks."""

    def make_algorithm(self) -> GRPO:
        return GRPO(self.config.grpo.with_length(self.config.generation.max_new_tokens))

    def _with_own_rewards(
        self, rewards: Sequence[Reward], config: TrainerConfig
    ) -> tuple[Sequence[Reward], TrainerConfig]:
        """Adds DAPO's overlong punishment, if set, as one more reward function with weight 1."""
        assert isinstance(config, GRPOTrainerConfig)
        length = config.generation.max_new_tokens
        buffer = config.grpo.overlong_buffer_tokens
        if not buffer:
            return rewards, config
        weights = [1.0] * len(rewards) if config.reward_weights is None else config.reward_weights
        if len(weights) != len(rewards):
            raise InputError(f"reward_weights={weights}: give one number for each of {len(rewards)} rewards.")
        rewards = [*rewards, soft_overlong_punishment(length, buffer)]
        return rewards, replace(config, reward_weights=[*weights, 1.0])

    def _check_rewards(self) -> None:
        super()._check_rewards()
        name = self.config.grpo.dynamic_sampling_reward
        if name is not None and name not in self.rewards.names:
            raise InputError(
                f"grpo.dynamic_sampling_reward={name!r} is none of the rewards {', '.join(self.rewards.names)}. Name one "
                "of them, or leave it null for the first."
            )

    def _wrapped(self, source: PromptSource) -> Source:
        rounds = self.config.grpo.dynamic_sampling_rounds
        return source if rounds == 1 else DynamicSampling(source, rounds=rounds)

    def _verdict(self) -> str:
        """Name of the reward that judges whether a completion is right: dynamic sampling's, or the first."""
        return self.config.grpo.dynamic_sampling_reward or self.rewards.names[0]
