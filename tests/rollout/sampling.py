"""Sampling with the in-process engine, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rlhf.distributed import Distributed
from rlhf.models.policy import Policy
from rlhf.rollout.engine import Completion, GenerationConfig, Key, Request
from rlhf.rollout.in_process import InProcessEngine


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Names the random numbers of one call; slots: the place of each prompt in the global step."""

    seed: int
    stream: int
    step: int
    slots: Sequence[int]


@cache
def alone() -> Distributed:
    return Distributed()


def generate(
    lm,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    draws: Draws,
    eos_ids: Sequence[int],
    num_completions: int = 1,
    greedy: bool = False,
) -> list[Completion]:
    """`num_completions` completions of each prompt, those of one prompt adjacent."""
    engine = InProcessEngine(Policy(lm), alone(), completions_at_once=config.completions_at_once)
    requests = [
        Request(prompt, Key(draws.seed, draws.stream, draws.step, slot, copy))
        for prompt, slot in zip(prompts, draws.slots, strict=True)
        for copy in range(num_completions)
    ]
    return [future.result() for future in engine.submit(requests, config.sampling(eos_ids, greedy=greedy))]
