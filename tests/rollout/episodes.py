"""Episodes made by hand, and the pass that scores them."""

from collections.abc import Sequence
from typing import Any

from rlhf.data.prompts import Prompt
from rlhf.models.policy import Policy
from rlhf.models.reference import FrozenReference
from rlhf.rewards.combine import RewardResult
from rlhf.rollout.engine import Completion, Span
from rlhf.rollout.episode import Episode, single_turn
from rlhf.rollout.sampled import Sampled
from rlhf.rollout.scoring import Scorer
from rlhf.types import Trajectories
from tests.rollout.sampling import alone


def completion(ids: Sequence[int], logprobs: Sequence[float] | None = None, *, ended: bool = True, version: int = 0):
    """Sampling log-probs are 0 if none are given; not ended: cut by the length limit."""
    values = [0.0] * len(ids) if logprobs is None else list(logprobs)
    return Completion(list(ids), values, "stop" if ended else "length", [Span(version, 0, len(ids))])


def episode(prompt: Sequence[int], ids: Sequence[int], logprobs: Sequence[float] | None = None, **how: Any) -> Episode:
    return single_turn(prompt, completion(ids, logprobs, **how))


def sampled(episodes: Sequence[Episode], scores: Sequence[float], **reward: Any) -> Sampled:
    """`episodes` as one process has them, with their scores."""
    return Sampled(
        prompts=[Prompt(e.prompt_ids, "", {}) for e in episodes],
        row_index=list(range(len(episodes))),
        episodes=list(episodes),
        rewards=RewardResult(**{"scores": list(scores), "per_function": {}, "totals": {}} | reward),
    )


def score(
    episodes: Sequence[Episode],
    scores: Sequence[float],
    policy: Any,
    reference: Any = None,
    *,
    row_index: Sequence[int] | None = None,
    microbatch_tokens: int = 10**6,
    step: int = 0,
) -> Trajectories:
    """`Scorer` on one process."""
    if isinstance(reference, Policy):
        reference = FrozenReference(reference.lm, temperature=reference.temperature)
    scorer = Scorer(policy=policy, reference=reference, microbatch_tokens=microbatch_tokens, distributed=alone())
    return scorer(episodes, scores, range(len(episodes)) if row_index is None else row_index, step=step)
