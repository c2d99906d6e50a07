"""Episodes of one or several turns, and their conversion to tensors.

Each token after the prompt is either sampled by the policy or inserted (a tool's answer, a user's next turn). Inserted
tokens are called *holes*: the policy reads them but did not choose them. In `Trajectories` their mask is False, the next
value of a sampled token is that of the next *sampled* token, and the score is at the last sampled token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.rollout.engine import Completion, EndedBy
from rlhf.types import Inputs


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One prompt and all tokens after it; the lists below have one entry per token of `ids`."""

    prompt_ids: list[int]
    ids: list[int]
    """Every token after the prompt, sampled or inserted."""
    sampled: list[bool]
    """Whether the policy sampled the token."""
    logprobs: list[float]
    """Sampling log-prob of each token, 0 in a hole."""
    rewards: list[float]
    """Reward given for each token; excludes the score of the whole episode."""
    ended: EndedBy
    versions: list[int]
    """Version of the policy that sampled each token; any number in a hole."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("ids", "sampled", "logprobs", "rewards", "versions")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Every list of an episode must have one entry per token, got the lengths {lengths}.")

    @classmethod
    def of_turns(cls, prompt_ids: Sequence[int], turns: Sequence[tuple[Completion, Sequence[int]]]) -> "Episode":
        """An episode of completions, each paired with the tokens inserted after it (usually none after the last)."""
        ids: list[int] = []
        sampled: list[bool] = []
        logprobs: list[float] = []
        versions: list[int] = []
        for completion, inserted in turns:
            ids += [*completion.ids, *inserted]
            sampled += [True] * len(completion.ids) + [False] * len(inserted)
            logprobs += [*completion.logprobs, *[0.0] * len(inserted)]
            versions += [span.version for span in completion.versions for _ in range(span.start, span.end)]
            versions += [versions[-1] if versions else 0] * len(inserted)
        return cls(
            prompt_ids=list(prompt_ids),
            ids=ids,
            sampled=sampled,
            logprobs=logprobs,
            rewards=[0.0] * len(ids),
            ended=turns[-1][0].ended,
            versions=versions,
        )


def single_turn(prompt_ids: Sequence[int], completion: Completion) -> Episode:
    """An episode of one completion."""
    return Episode.of_turns(prompt_ids, [(completion, ())])


class Packed(NamedTuple):
    """Episodes as right-padded tensors, (rows, time) unless said otherwise; time counts the tokens after the prompt."""

    inputs: Inputs
    """Inputs of `Policy`: input_ids (rows, width) and prompt_lengths (rows,)."""
    actions: Tensor
    mask: Tensor
    """True at sampled tokens."""
    last: Tensor
    """True at each row's last sampled token, where the episode ends and gets its score."""
    rewards: Tensor
    """float64, without the scores. The reward of a hole is moved to the sampled token before it."""
    sampling_logprobs: Tensor
    """float64"""
    versions: Tensor
    terminated: Tensor
    """True where `last` is, if the episode ended with an end token."""
    row_tokens: Tensor
    """(rows,): number of tokens, prompt included."""


def pack(episodes: Sequence[Episode], device: torch.device) -> Packed:
    """Episodes as tensors. Masks come from `sampled`, never from token ids: an end token may also be the pad token."""
    inputs = {
        "input_ids": _right_pad([e.prompt_ids + e.ids for e in episodes], device),
        "prompt_lengths": torch.tensor([len(e.prompt_ids) for e in episodes], device=device),
    }
    mask = _right_pad([e.sampled for e in episodes], device, torch.bool)
    lengths = torch.tensor([len(e.ids) for e in episodes], device=device)
    later = mask.flip(1).cumsum(1).flip(1) - mask.long()  # number of sampled tokens after each place
    last = mask & (later == 0)
    return Packed(
        inputs=inputs,
        actions=_right_pad([e.ids for e in episodes], device),
        mask=mask,
        last=last,
        rewards=_right_pad([_on_sampled(e.rewards, e.sampled) for e in episodes], device, torch.float64),
        sampling_logprobs=_right_pad([e.logprobs for e in episodes], device, torch.float64),
        versions=_right_pad([e.versions for e in episodes], device),
        terminated=last & torch.tensor([e.ended == "stop" for e in episodes], device=device).unsqueeze(1),
        row_tokens=inputs["prompt_lengths"] + lengths,
    )


def next_sampled(values: Tensor, mask: Tensor) -> Tensor:
    """At each place, the value at the next place where `mask` is True, or 0 if there is none. Both (rows, time).

    values[t] is V of the state before token t. So for a sampled token this is V before the next sampled token: behind a
    hole, V of the state that includes the hole.
    """
    time = mask.shape[1]
    places = torch.where(mask, torch.arange(time, device=mask.device), time)
    following = places.flip(1).cummin(1).values.flip(1)  # the place itself or the next sampled one
    following = torch.cat([following[:, 1:], torch.full_like(following[:, :1], time)], dim=1)
    padded = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
    return padded.gather(1, following)


def _on_sampled(rewards: list[float], sampled: list[bool]) -> list[float]:
    """Move the rewards of holes, such as a tool's verdict, to the sampled token before them (or else the first)."""
    moved = [0.0] * len(rewards)
    place = sampled.index(True) if True in sampled else 0
    for at, (reward, own) in enumerate(zip(rewards, sampled, strict=True)):
        place = at if own else place
        moved[place] += reward
    return moved


def _right_pad(rows: Sequence[Sequence[Any]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)
