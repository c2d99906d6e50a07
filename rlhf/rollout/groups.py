"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a source that samples until enough groups are informative.

A group whose verdicts are all equal is not informative: its advantages are 0. So further prompts are sampled until there
are enough informative groups, or the rounds are used up. Every process chooses the same groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rlhf.core.advantages import equal_groups
from rlhf.distributed import Distributed
from rlhf.rollout.prompts import PromptSource
from rlhf.rollout.sampled import Sampled, joined
from rlhf.runs.checkpoint import Saved
from rlhf.training.source import Collected


class DynamicSampling:
    """A `Source` that wraps a `PromptSource` and samples up to `rounds` times in a step."""

    def __init__(self, source: PromptSource, *, rounds: int) -> None:
        """source: must have a verdict, the reward by which groups count as informative."""
        assert source.verdict is not None, "dynamic sampling needs a verdict"
        self.source = source
        self.rounds = rounds
        self.verdict = source.verdict

    def collect(self, step: int) -> Collected:
        source = self.source
        chosen, sampled, used = sample_informative(
            lambda first, count: source.sample(step, first, count),
            count=source.prompts_per_step,
            rounds=self.rounds,
            size=source.completions_per_prompt,
            verdict=self.verdict,
            distributed=source.distributed,
        )
        collected = source.collected(step, chosen, sampled, used)
        extra = {"dynamic_sampling/rounds": float(len(sampled)), "dynamic_sampling/prompts": float(used)}
        return replace(collected, metrics=dict(collected.metrics) | extra)

    def state(self, step: int) -> Saved | None:
        return self.source.state(step)

    def load(self, saved: Saved) -> None:
        self.source.load(saved)


@dataclass(frozen=True)
class PromptGroup:
    """The completions of one prompt."""

    slot: int
    """The prompt's place among those sampled for this step."""
    informative: bool
    """Whether its verdicts differ."""
    sampled: Sampled


def split_groups(sampled: Sampled, size: int, verdict: str) -> list[PromptGroup]:
    """Split into groups of `size` adjacent completions; `verdict` names the reward whose scores are compared."""
    informative = ~equal_groups(*verdict_scores(sampled, verdict, size))
    return [
        PromptGroup(
            sampled.row_index[i * size] // size, bool(informative[i]), sampled.select(range(i * size, (i + 1) * size))
        )
        for i in range(len(sampled.episodes) // size)
    ]


def verdict_scores(sampled: Sampled, verdict: str, size: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Arguments of `equal_groups`: scores of one reward (0 if it abstained), group size, and where a score exists."""
    scores = sampled.rewards.per_function[verdict]
    said = torch.tensor([score is not None for score in scores], dtype=torch.bool)  # an empty list would give float
    return torch.tensor([score or 0.0 for score in scores], dtype=torch.float64), size, said


def sample_informative(
    sample: Callable[[int, int], Sampled],
    *,
    count: int,
    rounds: int,
    size: int,
    verdict: str,
    distributed: Distributed,
) -> tuple[Sampled, list[Sampled], int]:
    """Sample round after round until `count` groups are informative.

    The first round samples `count` prompts. Later rounds sample as many as the share of informative groups so far makes
    necessary, whatever the number of processes. Groups still missing after the last round are replaced by groups of
    equal verdicts, so that every step has the same size.

    Args:
        sample: sample(first, number) gives this process's share of `number` prompts, those after the first `first` of
            the step; it may be empty.
        count: groups needed, over all processes.
        rounds: maximum number of rounds.
        size: completions per group.
        verdict: name of the reward whose scores are compared.
        distributed: the process group.

    Returns:
        This process's share of the chosen groups; all that it sampled; and the number of prompts used by all processes.
    """
    groups: list[PromptGroup] = []
    sampled: list[Sampled] = []
    used = found = 0
    for _ in range(rounds):
        expected = math.ceil((count - found) * used / found) if found else count
        number = min(count, expected)
        sampled.append(sample(used, number))
        groups += split_groups(sampled[-1], size, verdict)
        used += number
        found = len([1 for informative in distributed.gather_objects([g.informative for g in groups]) if informative])
        if found >= count:
            break
    return _share(groups, count, size, distributed), sampled, used


def _share(groups: list[PromptGroup], count: int, size: int, distributed: Distributed) -> Sampled:
    """This process's even share of the first `count` groups, informative ones first, whichever process sampled them."""
    order = sorted(distributed.gather_objects([(not g.informative, g.slot) for g in groups]))[:count]
    chosen = {slot for _, slot in order}
    everyone = distributed.gather_objects([g for g in groups if g.slot in chosen])
    everyone.sort(key=lambda group: group.slot)
    mine = distributed.share(count)
    return joined([everyone[i].sampled for i in mine], mine.start * size)
