"""The interface of the sampler: it takes requests of token ids and gives completions, log-probs and policy versions.

All sampling goes through a `RolloutEngine`: training, evaluation, the embedded pipelines and the command `sample`.
`InProcessEngine` (in_process.py) samples with the policy itself; an inference server would be another implementation.
tests/rollout/conformance.py tests what every engine must do.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from rlhf.errors import InputError, TrainingError
from rlhf.lifeline import phase
from rlhf.settings import check_types

EndedBy = Literal["stop", "length", "aborted"]
"""What ended a completion: an end token, the length limit, or the engine, which gave up the request."""
Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Function that returns copies of the policy's weights by name; an engine calls it when it needs them."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How completions are sampled. Tokens are drawn from the full softmax(logits / temperature): cutting it (top-p, top-k)
    would make the sampler a different policy from the one that is trained."""

    max_new_tokens: int = 64
    """Length limit of a completion in tokens, including its end-of-sequence token."""
    temperature: float = 1.0
    """Divides the logits, both in sampling and in scoring."""
    completions_at_once: int = 256
    """Completions that one process samples in parallel. Affects memory and speed only."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "completions_at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"generation.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"generation.temperature must be above 0, got {self.temperature}.")

    def sampling(self, end_ids: Sequence[int], *, greedy: bool = False) -> "Sampling":
        """The `Sampling` that an engine takes, made from these settings."""
        return Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, end_ids=tuple(end_ids), greedy=greedy
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of the requests passed to `submit` are drawn."""

    max_new_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    """A completion ends at the first of these tokens and includes it."""
    greedy: bool = False
    """Take the most likely token each time."""


class Key(NamedTuple):
    """Identifies the random draws of one completion. With the same weights, equal keys and prompts give equal
    completions, so a request can be repeated safely. No two completions of one step share a key."""

    seed: int
    stream: int
    """Separates the draws of training and evaluation, see core/random.py."""
    step: int
    slot: int
    """The place of the prompt in the global step."""
    copy: int = 0
    """Index of the completion among those of its prompt."""
    turn: int = 0
    """Index of the completion within its episode, from 0."""


@dataclass(frozen=True)
class Request:
    """Asks for one completion of `ids`."""

    ids: Sequence[int]
    """The prompt, or at a later turn all tokens so far."""
    key: Key
    max_new_tokens: int | None = None
    """If set, replaces the limit of the `Sampling`. At least 1."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"A request must have room for a token, got max_new_tokens={self.max_new_tokens}.")


class Span(NamedTuple):
    """Tokens start .. end - 1 of a completion were sampled by the policy after `version` updates."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """The result of one request."""

    ids: list[int]
    """Sampled tokens, including the end token if there is one."""
    logprobs: list[float]
    """Log-prob of each token under softmax(logits / temperature) when it was sampled."""
    ended: EndedBy
    versions: list[Span]
    """Spans that cover all tokens, in order."""


@dataclass(frozen=True)
class Promises:
    """What an engine guarantees; the learner checks the log-probs at every step."""

    stateless: bool
    """A completion is a pure function of weights, prompt and key, bit for bit, whatever else is in its batch."""
    exact: bool
    """Log-probs equal those of the training forward up to rounding. Otherwise they differ by the engine's precision."""
    logprob_gap: float
    """Difference between a token's sampling and training log-prob, in nats, above which something is wrong."""


class EngineLost(RuntimeError):
    """The engine can no longer answer. Restart it, sync it and submit again; equal keys give equal completions."""


class RolloutEngine(Protocol):
    """Samples completions for a policy. Every process of a run has its own."""

    promises: Promises
    version: int
    """Number of updates of the policy that new requests are sampled from."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[Completion]]:
        """A future for each request, in order. All requests share seed and stream. Raises EngineLost, or the futures do."""
        ...

    def sync(self, weights: Weights, version: int, *, in_flight: Literal["wait", "continue"] = "wait") -> None:
        """Sample with these weights from now on. All processes call it.

        in_flight: "wait" lets running requests end first; with "continue" they go on with the new weights.
        """
        ...

    def restart(self) -> None:
        """Make a lost engine usable again. It has no weights until `sync` is called."""
        ...

    def close(self) -> None:
        """Free what the engine holds. Called by whoever made it."""
        ...


@phase("engine sync")
def hand_over(engine: RolloutEngine, weights: Weights, version: int) -> None:
    """Sync the engine, and raise TrainingError if it does not say that it has these weights."""
    engine.sync(weights, version)
    if engine.version != version:
        raise TrainingError(
            f"The engine was given the weights after {version} updates and says that it samples from those after "
            f"{engine.version}: mend its sync."
        )


@phase("sampling")
def completions_of(
    engine: RolloutEngine,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    timeout_s: float | None = None,
    weights: Weights | None = None,
) -> list[Completion]:
    """The engine's completions of `requests`, in order.

    Args:
        engine: samples.
        requests: what to complete.
        sampling: how tokens are drawn.
        timeout_s: seconds to wait for all of them; None: no limit.
        weights: the policy's. With them an engine that is lost is restarted, synced and asked once more.

    Raises:
        TrainingError: The engine failed, took too long, or its answers do not fit the requests.
    """
    version = engine.version  # a lost engine may not know any more
    try:
        try:
            return _answers(engine, requests, sampling, timeout_s)
        except EngineLost:
            if weights is None:
                raise
            engine.restart()
            hand_over(engine, weights, version)
            return _answers(engine, requests, sampling, timeout_s)
    except (EngineLost, CancelledError) as error:
        raise TrainingError(f"The engine was lost: {error!r}. Start it again and resume the run.") from error


def _answers(
    engine: RolloutEngine, requests: Sequence[Request], sampling: Sampling, timeout_s: float | None
) -> list[Completion]:
    give_up = None if timeout_s is None else time.monotonic() + timeout_s
    futures = engine.submit(requests, sampling)
    if len(futures) != len(requests):
        raise TrainingError(f"The engine gave {len(futures)} answers to {len(requests)} requests: mend it.")
    wait(futures, None if give_up is None else max(0.0, give_up - time.monotonic()))
    late = [future for future in futures if not future.done()]
    if late:
        for future in late:
            future.cancel()
        raise TrainingError(
            f"The engine gave {len(futures) - len(late)} of {len(futures)} completions within "
            f"engine_timeout_s={timeout_s}. Nothing was trained in this step. Look at the engine's own log, or raise "
            "engine_timeout_s."
        )
    answers = [future.result() for future in futures]
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if problem := _problem(request, answer, sampling):
            raise TrainingError(f"The engine's answer to request {index} {problem}: mend the engine.")
    return answers


def _problem(request: Request, answer: Completion, sampling: Sampling) -> str | None:
    """What does not fit together in an answer; None if all of it does."""
    if not isinstance(answer, Completion):
        return f"is of type {type(answer).__name__}"
    tokens = len(answer.ids)
    ends = [0, *(span.end for span in answer.versions)]  # each span begins where the one before it ended
    if len(answer.logprobs) != tokens or ends[-1] != tokens or ends[:-1] != [span.start for span in answer.versions]:
        return f"has {tokens} tokens, {len(answer.logprobs)} log-probs and versions {answer.versions} of them"
    if tokens > (request.max_new_tokens or sampling.max_new_tokens) or min(answer.ids, default=0) < 0:
        return f"has {tokens} tokens, more than it may, or one below 0: {answer.ids[:8]}"
    if (answer.ended == "stop") != bool(answer.ids and answer.ids[-1] in sampling.end_ids):
        return f"ended by {answer.ended!r} with the last tokens {answer.ids[-2:]}, where {sampling.end_ids} end it"
    return None
