"""The lines that a run prints at its start, and the identity that its checkpoints store."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch.nn import Module

from rlhf.algorithms.base import Algorithm
from rlhf.data.prompts import PromptDataset
from rlhf.distributed import Distributed
from rlhf.models.reference import Reference
from rlhf.trainers.config import TrainerConfig

MUST_MATCH = {"seed", "prompts_per_step", "dataset", "dataset_columns", "reference", "algorithm", "generation"}
"""Keys of `identity` that a resumed run may not change: prompts, random draws or the objective depend on them."""

POLICY_FOLDERS = ("policy", "policy.tmp")
"""Folders in which a trainer saves the policy, beside the files that `Run` writes."""


def description(
    config: TrainerConfig,
    policy: Module,
    data: PromptDataset,
    eval_data: PromptDataset | None,
    reward_names: Sequence[str],
    distributed: Distributed,
    *,
    completions_per_prompt: int,
) -> list[str]:
    """Lines that describe the run about to start.

    Args:
        data: the training prompts.
        eval_data: the evaluation prompts, if there are any.
        completions_per_prompt: completions that a rollout samples for each prompt.
    """
    completions = config.prompts_per_step * completions_per_prompt
    size = config.update.minibatch_size or completions
    layout = f"{distributed.layout.name}, " if distributed.world_size > 1 else ""
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    lines = [
        f"{distributed.world_size} process(es) on {distributed.device.type}, {layout}{config.precision}, {parameters:,} "
        f"parameters{'' if trained == parameters else f' ({trained:,} trained)'}, output in {config.output_dir}",
        f"data: {len(data)} prompts ({data.dropped} dropped, {data.truncated} cut), "
        + (f"{len(eval_data)} for evaluation" if eval_data else "none for evaluation"),
        f"batch: {config.prompts_per_step} prompts x {completions_per_prompt} = {completions} completions "
        f"per step, {config.update.num_epochs} epoch(s) x {completions // size} minibatch(es) of {size}",
        f"rewards: {', '.join(reward_names)}",
    ]
    if config.prompts_per_step > len(data):
        lines.append(
            f"note: a step takes {config.prompts_per_step} prompts, but the data set has {len(data)}: "
            "prompts repeat within a step, with other random draws"
        )
    return lines


def identity(
    config: TrainerConfig,
    data: PromptDataset,
    reward_names: Sequence[str],
    reference: Reference | None,
    algorithm: Algorithm,
) -> dict[str, Any]:
    """Settings and fingerprints that a checkpoint stores, so that a resume with other ones is noticed.

    Args:
        data: the training prompts.
        reward_names: names of the rewards, in order.
        reference: the reference policy, if the algorithm needs one.
        algorithm: only its class name is stored; its settings are part of `config`.
    """
    return {
        **asdict(config),
        "dataset": data.fingerprint,
        "dataset_columns": data.content_fingerprint,
        "rewards": list(reward_names),
        "reference": None if reference is None else reference.fingerprint,
        "algorithm": type(algorithm).__name__,
    }


def first_check(metrics: Mapping[str, float]) -> str:
    """The line printed after the first step: gaps between policy, sampler and reference. metrics: from the learner."""
    gap, kl = metrics.get("sampler_gap"), metrics.get("reward_kl")
    sampled = "older weights sampled every token of this step"
    if gap is not None:
        sampled = f"sampling and training log-probs differ by at most {gap:.2g} (ratio within {gap:.2g} of 1)"
    reference = "no reference" if kl is None else f"KL(policy || reference) = {kl:.3g} nats per completion"
    return f"check: {sampled}; {reference}"
