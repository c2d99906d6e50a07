"""What a run says at its start, and what its checkpoints remember of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch.nn import Module

from rlhf.algorithms.base import Algorithm
from rlhf.data.prompts import PromptDataset
from rlhf.distributed import Distributed
from rlhf.trainers.config import TrainerConfig
from rlhf.training.weights import fingerprint

MUST_MATCH = {"seed", "prompts_per_step", "dataset", "dataset_columns", "reference", "algorithm", "generation"}
"""Of `identity`, what a resumed run may not change: prompts, draws or objective would be others from there on."""


POLICY_FOLDERS = ("policy", "policy.tmp")
"""Where a run's owner leaves the trained policy, beside what `Run` writes."""


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
    """Lines that say what will run."""
    completions = config.prompts_per_step * completions_per_prompt
    size = config.update.minibatch_size or completions
    lines = [
        f"{distributed.world_size} process(es) on {distributed.device.type}, {config.precision}, "
        f"{sum(p.numel() for p in policy.parameters()):,} parameters, output in {config.output_dir}",
        f"data: {len(data)} prompts ({data.dropped} dropped, {data.truncated} cut), "
        + (f"{len(eval_data)} for evaluation" if eval_data else "none for evaluation"),
        f"batch: {config.prompts_per_step} prompts x {completions_per_prompt} = {completions} completions "
        f"per step, {config.update.num_epochs} epoch(s) x {completions // size} minibatch(es) of {size}",
        f"rewards: {', '.join(reward_names)}",
    ]
    if config.prompts_per_step > len(data):
        lines.append(
            f"note: a step takes {config.prompts_per_step} prompts and there are {len(data)}: they repeat within it, with "
            "other draws"
        )
    return lines


def identity(
    config: TrainerConfig,
    data: PromptDataset,
    reward_names: Sequence[str],
    reference: Module | None,
    algorithm: Algorithm,
) -> dict[str, Any]:
    """Settings and fingerprints that a checkpoint remembers of its run, to notice a resume with something else."""
    return {
        **asdict(config),
        "dataset": data.fingerprint,
        "dataset_columns": data.content_fingerprint,
        "rewards": list(reward_names),
        "reference": None if reference is None else fingerprint(reference),
        "algorithm": type(algorithm).__name__,
    }


def first_check(metrics: Mapping[str, float]) -> str:
    """Of the first step, before which policy, sampler and reference are one. metrics: what the learner gave back."""
    gap, kl = metrics["sampler_gap"], metrics.get("reward_kl")
    return f"check: sampling and training log-probs differ by at most {gap:.2g} (ratio within {gap:.2g} of 1); " + (
        "no reference" if kl is None else f"KL(policy || reference) = {kl:.3g} nats per completion"
    )
