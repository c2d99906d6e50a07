"""What an engine and, between its turns, a conversation or an environment make together; and episodes as tensors.

The tokens after the prompt are sampled by the policy or inserted by somebody else (a tool's answer, a user's next turn).
Inserted ones are *holes*: the policy reads them, but they are nothing that it did. In `Trajectories` their mask is False,
the value that follows a sampled token is that of the next *sampled* one, and the score lies on the last sampled one.
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
    """One prompt and everything after it; lists have one entry per token of `ids`."""

    prompt_ids: list[int]
    ids: list[int]
    """Every token after the prompt, sampled or inserted."""
    sampled: list[bool]
    """Which of them the policy sampled."""
    logprobs: list[float]
    """Sampling log-prob of each sampled token, 0 in a hole."""
    rewards: list[float]
    """What was paid for each token as it came; the score of the whole episode is no part of it."""
    ended: EndedBy
    versions: list[int]
    """The policy's version that sampled each token; in a hole any."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("ids", "sampled", "logprobs", "rewards", "versions")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"An episode has one entry per token in each of its lists, got {lengths}.")

    @classmethod
    def of_turns(cls, prompt_ids: Sequence[int], turns: Sequence[tuple[Completion, Sequence[int]]]) -> "Episode":
        """Completions, each followed by the tokens that were inserted after it (none after the last, usually)."""
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
    """Of `Policy`: input_ids (rows, width) and prompt_lengths (rows,)."""
    actions: Tensor
    mask: Tensor
    """True at sampled tokens."""
    last: Tensor
    """True at each row's last sampled token, where the episode ends and its score lies."""
    rewards: Tensor
    """float64; without the scores. What was paid for a hole's token lies on the sampled one before it."""
    sampling_logprobs: Tensor
    """float64"""
    versions: Tensor
    terminated: Tensor
    """As `last`, where an end token came."""
    row_tokens: Tensor
    """(rows,): prompt and everything after it."""


def pack(episodes: Sequence[Episode], device: torch.device) -> Packed:
    """Masks come from what was sampled, never from token ids: an end token counts, and may also be the pad token."""
    inputs = {
        "input_ids": _right_pad([e.prompt_ids + e.ids for e in episodes], device),
        "prompt_lengths": torch.tensor([len(e.prompt_ids) for e in episodes], device=device),
    }
    mask = _right_pad([e.sampled for e in episodes], device, torch.bool)
    lengths = torch.tensor([len(e.ids) for e in episodes], device=device)
    later = mask.flip(1).cumsum(1).flip(1) - mask.long()  # sampled tokens after each
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
    """At each place the value at the next place where `mask` is True, 0 if there is none; (rows, time) both.

    With V of the state before each token this is the value of what truly follows a sampled token: across a hole, V before
    the next sampled one, which has read the hole.
    """
    time = mask.shape[1]
    places = torch.where(mask, torch.arange(time, device=mask.device), time)
    following = places.flip(1).cummin(1).values.flip(1)  # the place itself or the next sampled one
    following = torch.cat([following[:, 1:], torch.full_like(following[:, :1], time)], dim=1)
    padded = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
    return padded.gather(1, following)


def _on_sampled(rewards: list[float], sampled: list[bool]) -> list[float]:
    """Rewards paid for holes, such as a tool's verdict, moved to the sampled token that brought them about."""
    moved, place = [0.0] * len(rewards), sampled.index(True) if True in sampled else 0
    for at, (reward, own) in enumerate(zip(rewards, sampled, strict=True)):
        place = at if own else place
        moved[place] += reward
    return moved


def _right_pad(rows: Sequence[Sequence[Any]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)
