"""Which groups of completions a step trains on, and what is told of them.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose verdicts are all equal teach nothing, so further
prompts are sampled until there are enough of the others, or the rounds are used up. Every process chooses the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf.core.advantages import equal_groups
from rlhf.distributed import Distributed
from rlhf.rewards.combine import RewardResult
from rlhf.rollout.scoring import Rollout


@dataclass(frozen=True)
class Group:
    """The completions of one prompt."""

    slot: int
    """The prompt's place among those sampled for this step."""
    informative: bool
    """Its verdicts differ."""
    rollout: Rollout


def split_groups(rollout: Rollout, size: int, verdict: str) -> list[Group]:
    """The groups of `size` adjacent completions; `verdict` names the reward whose scores are compared."""
    informative = ~equal_groups(*verdict_scores(rollout, verdict, size))
    return [
        Group(
            rollout.row_index[i * size] // size, bool(informative[i]), select(rollout, range(i * size, (i + 1) * size))
        )
        for i in range(len(rollout.completions) // size)
    ]


def verdict_scores(rollout: Rollout, verdict: str, size: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Scores of one reward (0 where it abstained), the group's size, and where there is a score: for `equal_groups`."""
    scores = rollout.rewards.per_function[verdict]
    said = torch.tensor([score is not None for score in scores], dtype=torch.bool)  # none at all is no float either
    return torch.tensor([score or 0.0 for score in scores], dtype=torch.float64), size, said


def nothing(names: Sequence[str], version: int) -> Rollout:
    """The rollout of a process without a prompt: rounds may be smaller than the number of processes."""
    rewards = RewardResult(scores=[], per_function={name: [] for name in names}, totals={})
    return Rollout(prompts=[], row_index=[], completions=[], rewards=rewards, version=version)


def select(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """The given rows, in that order."""

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    rewards = RewardResult(
        scores=of(rollout.rewards.scores),
        per_function={name: of(scores) for name, scores in rollout.rewards.per_function.items()},
        totals=rollout.rewards.totals,
        extra={name: of(values) for name, values in rollout.rewards.extra.items()},
    )
    return replace(
        rollout,
        rewards=rewards,
        prompts=of(rollout.prompts),
        row_index=of(rollout.row_index),
        completions=of(rollout.completions),
    )


def join(groups: Sequence[Group], first: int) -> Rollout:
    """The groups as one rollout; its rows are numbered as those of the groups `first`, `first` + 1, ... of the batch."""
    rollouts = [group.rollout for group in groups]
    parts, size = [rollout.rewards for rollout in rollouts], len(rollouts[0].completions)

    def of(lists: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for values in lists for value in values]

    rewards = RewardResult(
        scores=of([part.scores for part in parts]),
        per_function={name: of([part.per_function[name] for part in parts]) for name in parts[0].per_function},
        totals=parts[0].totals,
        extra={
            name: of([part.extra[name] for part in parts])
            for name in parts[0].extra
            if all(name in part.extra for part in parts)
        },
    )
    return Rollout(
        prompts=of([rollout.prompts for rollout in rollouts]),
        row_index=list(range(first * size, (first + len(groups)) * size)),
        completions=of([rollout.completions for rollout in rollouts]),
        rewards=rewards,
        version=rollouts[0].version,
    )


def sample_informative(
    sample: Callable[[int, int], Rollout],
    *,
    count: int,
    rounds: int,
    size: int,
    verdict: str,
    distributed: Distributed,
) -> tuple[Rollout, list[Rollout], int]:
    """This process's share of `count` groups, informative ones first; all it sampled; and the prompts used by all.

    sample(first, number): this process's share of `number` prompts, those after the first `first` of the step; it may be
    empty. The first round asks for `count`; later ones for as many as the share of informative groups so far makes
    necessary, whatever the number of processes. After the last round groups of equal verdicts fill what is missing, so
    that every step has the same size.
    """
    groups: list[Group] = []
    sampled: list[Rollout] = []
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
    return _share(groups, count, distributed), sampled, used


def _share(groups: list[Group], count: int, distributed: Distributed) -> Rollout:
    """The first `count` groups, informative ones first, dealt out evenly to the processes whoever sampled them."""
    order = sorted(distributed.gather_objects([(not g.informative, g.slot) for g in groups]))[:count]
    chosen = {slot for _, slot in order}
    everyone = distributed.gather_objects([g for g in groups if g.slot in chosen])
    everyone.sort(key=lambda group: group.slot)
    mine = distributed.share(count)
    return join([everyone[i] for i in mine], mine.start)


def length_metrics(rollouts: Sequence[Rollout], verdict: str, distributed: Distributed) -> dict[str, float]:
    """Lengths of the step's completions in tokens: the extremes, of those that ended, and by verdict."""
    mine = [
        (len(completion.ids), completion.ended, score)
        for rollout in rollouts
        for completion, score in zip(rollout.completions, rollout.rewards.per_function[verdict], strict=True)
    ]
    rows = distributed.gather_objects(mine)
    kinds = {
        "completion_length_terminated": [length for length, ended, _ in rows if ended],
        "completion_length_right": [length for length, _, score in rows if score is not None and score > 0],
        "completion_length_wrong": [length for length, _, score in rows if score is not None and score <= 0],
    }
    lengths = [length for length, _, _ in rows]
    metrics = {"completion_length_min": float(min(lengths)), "completion_length_max": float(max(lengths))}
    return metrics | {name: sum(values) / len(values) for name, values in kinds.items() if values}
