"""The sampled episodes of a step with their rewards, and the metrics computed from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.prompts import Prompt
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.rewards.combine import RewardResult, deviation, deviations
from rlhf.rollout.episode import Episode
from rlhf.training.sums import MetricSums

MissingEOS = Literal["keep", "replace", "subtract"]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One process's episodes of a step; those of one prompt are adjacent. Lists have one entry per episode."""

    prompts: list[Prompt]
    row_index: list[int]
    """Row of each episode in the global batch."""
    episodes: list[Episode]
    rewards: RewardResult

    def select(self, rows: Sequence[int]) -> "Sampled":
        """The given rows, in that order."""

        def of(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        rewards = RewardResult(
            scores=of(self.rewards.scores),
            per_function={name: of(scores) for name, scores in self.rewards.per_function.items()},
            totals=self.rewards.totals,
            extra={name: of(values) for name, values in self.rewards.extra.items()},
        )
        return replace(
            self,
            rewards=rewards,
            prompts=of(self.prompts),
            row_index=of(self.row_index),
            episodes=of(self.episodes),
        )


def no_episodes(reward_names: Sequence[str]) -> Sampled:
    """The empty `Sampled` of a process that has no prompts."""
    rewards = RewardResult(scores=[], per_function={name: [] for name in reward_names}, totals={})
    return Sampled(prompts=[], row_index=[], episodes=[], rewards=rewards)


def joined(parts: Sequence[Sampled], first_row: int) -> Sampled:
    """Concatenate the parts; rows of the result are numbered from `first_row` on."""
    rewards = [part.rewards for part in parts]

    def of(lists: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for values in lists for value in values]

    together = RewardResult(
        scores=of([part.scores for part in rewards]),
        per_function={name: of([part.per_function[name] for part in rewards]) for name in rewards[0].per_function},
        totals=rewards[0].totals,
        extra={
            name: of([part.extra[name] for part in rewards])
            for name in rewards[0].extra
            if all(name in part.extra for part in rewards)
        },
    )
    episodes = of([part.episodes for part in parts])
    return Sampled(
        prompts=of([part.prompts for part in parts]),
        row_index=list(range(first_row, first_row + len(episodes))),
        episodes=episodes,
        rewards=together,
    )


def final_scores(sampled: Sampled, missing_eos: MissingEOS, value: float) -> list[float | None]:
    """Scores of the episodes, changed by `missing_eos` for those without an end token.

    "keep" leaves such a score, "replace" sets it to `value` (N+ detail 23: -1), "subtract" subtracts `value` from it
    (TRL's missing_eos_penalty). None: the episode has no score, or no token that could learn from it.
    """

    def final(score: float | None, episode: Episode) -> float | None:
        if not any(episode.sampled):
            return None
        if episode.ended == "stop" or missing_eos == "keep":
            return score
        if missing_eos == "replace":
            return value
        return None if score is None else score - value

    return [final(score, episode) for score, episode in zip(sampled.rewards.scores, sampled.episodes, strict=True)]


def rollout_metrics(
    sampled: Sequence[Sampled], reward_names: Sequence[str], distributed: Distributed
) -> dict[str, float]:
    """Metrics of the rollout, before the update, over all processes."""
    sums = MetricSums()
    totals = [part.rewards.totals for part in sampled]
    for part in sampled:
        scores = [score for score in part.rewards.scores if score is not None]
        sums.add(_mean("score", scores) | _mean("score_std", [s * s for s in scores]))
        sums.add(_mean("completion_length", [sum(episode.sampled) for episode in part.episodes]))
        sums.add(_mean("truncated_fraction", [episode.ended != "stop" for episode in part.episodes]))
    own = [name for total in totals for name in total]
    for name in sorted(set(distributed.gather_objects(own))):  # a metric may be logged on some processes only
        pairs = [total.get(name, (0.0, 0.0)) for total in totals]
        sums.add({name: (_number(sum(t for t, _ in pairs)), _number(sum(n for _, n in pairs)))})
    metrics = sums.reduce(distributed.all_sum)
    if "score" not in metrics:
        raise InputError(
            f"No completion of this step has a score: {', '.join(reward_names)} returned None for every row. At "
            "least one reward function must return numbers."
        )
    metrics["score_std"] = deviation(metrics["score_std"], metrics["score"])
    return deviations(metrics)


def length_metrics(sampled: Sequence[Sampled], verdict: str, distributed: Distributed) -> dict[str, float]:
    """Completion lengths of the step over all processes, in sampled tokens.

    Minimum, maximum, and means over the completions that ended, that are right and that are wrong (by `verdict`).
    """
    mine = [
        (sum(episode.sampled), episode.ended == "stop", score)
        for part in sampled
        for episode, score in zip(part.episodes, part.rewards.per_function[verdict], strict=True)
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


def lines(sampled: Sampled, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The first `count` episodes as lines of completions.jsonl; "row" is the row in the global batch."""
    rows = range(min(count, len(sampled.episodes)))
    texts = tokenizer.batch_decode([sampled.episodes[row].ids for row in rows])
    rewards = sampled.rewards
    return [
        {name: values[row] for name, values in rewards.extra.items()}
        | {f"rewards/{name}": values[row] for name, values in rewards.per_function.items()}
        | {
            "row": sampled.row_index[row],
            "prompt": sampled.prompts[row].prompt,
            "completion": texts[row],
            "score": rewards.scores[row],
        }
        for row in rows
    ]


def with_advantages(samples: Sequence[Mapping[str, Any]], advantages: Tensor) -> list[dict[str, Any]]:
    """`samples` with "row" replaced by the advantage of that row. advantages: (rows,) of the global batch."""
    rows = [dict(sample) for sample in samples]
    return [row | {"advantage": advantages[row.pop("row")].item()} for row in rows]


def _mean(name: str, values: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """`values` as a (sum, count) pair, which can be added over processes."""
    return {name: (_number(sum(values)), _number(len(values)))}


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
