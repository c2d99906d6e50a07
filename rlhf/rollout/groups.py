"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a source that samples on until groups tell something.

Groups whose verdicts are all equal teach nothing, so further prompts are sampled until there are enough of the others, or
the rounds are used up. Every process chooses the same.
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
    """A `Source` around one of prompts: up to `rounds` rounds of sampling in a step."""

    def __init__(self, source: PromptSource, *, rounds: int) -> None:
        """source: must have a verdict, by which groups are compared."""
        assert source.verdict is not None, "dynamic sampling compares verdicts"
        self.source, self.rounds, self.verdict = source, rounds, source.verdict

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
    """Its verdicts differ."""
    sampled: Sampled


def split_groups(sampled: Sampled, size: int, verdict: str) -> list[PromptGroup]:
    """The groups of `size` adjacent completions; `verdict` names the reward whose scores are compared."""
    informative = ~equal_groups(*verdict_scores(sampled, verdict, size))
    return [
        PromptGroup(
            sampled.row_index[i * size] // size, bool(informative[i]), sampled.select(range(i * size, (i + 1) * size))
        )
        for i in range(len(sampled.episodes) // size)
    ]


def verdict_scores(sampled: Sampled, verdict: str, size: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Scores of one reward (0 where it abstained), the group's size, and where there is a score: for `equal_groups`."""
    scores = sampled.rewards.per_function[verdict]
    said = torch.tensor([score is not None for score in scores], dtype=torch.bool)  # none at all is no float either
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
    """This process's share of `count` groups, informative ones first; all it sampled; and the prompts used by all.

    sample(first, number): this process's share of `number` prompts, those after the first `first` of the step; it may be
    empty. The first round asks for `count`; later ones for as many as the share of informative groups so far makes
    necessary, whatever the number of processes. After the last round groups of equal verdicts fill what is missing, so
    that every step has the same size.
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
    """The first `count` groups, informative ones first, dealt out evenly to the processes whoever sampled them."""
    order = sorted(distributed.gather_objects([(not g.informative, g.slot) for g in groups]))[:count]
    chosen = {slot for _, slot in order}
    everyone = distributed.gather_objects([g for g in groups if g.slot in chosen])
    everyone.sort(key=lambda group: group.slot)
    mine = distributed.share(count)
    return joined([everyone[i].sampled for i in mine], mine.start * size)
