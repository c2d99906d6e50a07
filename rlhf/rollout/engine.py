"""The port to whoever samples: requests of token ids in, completions with their log-probs and policy versions out.

Everything that samples goes through a `RolloutEngine`: training, evaluation, the embedded pipelines and the command
`sample`. `InProcessEngine` (in_process.py) is the policy itself; an inference server is another implementation.
tests/rollout/conformance.py says, as tests, what every engine promises.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from rlhf.errors import InputError
from rlhf.settings import check_types

EndedBy = Literal["stop", "length", "aborted"]
"""An end token, the limit of tokens, or the engine that gave the request up."""
Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives the policy's weights by name, when they are wanted."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How completions are sampled. The whole distribution softmax(logits / temperature) is used: cutting it (top-p, top-k)
    would make the sampler another policy than the one that is trained."""

    max_new_tokens: int = 64
    """Length limit of a completion, its end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in scoring alike."""
    completions_at_once: int = 256
    """Completions one process samples side by side: changes memory and speed."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "completions_at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"generation.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"generation.temperature must be above 0, got {self.temperature}.")

    def sampling(self, end_ids: Sequence[int], *, greedy: bool = False) -> "Sampling":
        """These settings as an engine takes them."""
        return Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, end_ids=tuple(end_ids), greedy=greedy
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of a submission are drawn."""

    max_new_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    """A completion ends with the first of these, which belongs to it."""
    greedy: bool = False
    """The likeliest token each time."""


class Key(NamedTuple):
    """Names the random numbers of a completion. Equal keys and prompts give equal completions while the weights are the
    same, so that asking again is safe; two completions of one step never share a key."""

    seed: int
    stream: int
    """Keeps training and evaluation apart, see core/random.py."""
    step: int
    slot: int
    """The place of the prompt in the global step."""
    copy: int = 0
    """Which of the prompt's completions."""
    turn: int = 0
    """Which of the episode's completions: 0 for the first."""


@dataclass(frozen=True)
class Request:
    """One completion is wanted of these tokens: a prompt, or everything so far when a later turn begins."""

    ids: Sequence[int]
    key: Key
    max_new_tokens: int | None = None
    """Instead of the submission's limit."""


class Span(NamedTuple):
    """Tokens start .. end - 1 of a completion were sampled by this version of the policy: after so many updates."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """What was sampled for one request."""

    ids: list[int]
    """Tokens, the end token included if it came."""
    logprobs: list[float]
    """Log-prob of each token under softmax(logits / temperature) when it was sampled."""
    ended: EndedBy
    versions: list[Span]
    """Cover all tokens, in order."""


@dataclass(frozen=True)
class Promises:
    """What an engine says of itself; the learner checks the log-probs at every step."""

    stateless: bool
    """A completion is a pure function of weights, prompt and key, to the bit, whatever it is sampled beside."""
    exact: bool
    """Log-probs are those of the training forward but for rounding. Otherwise they differ by the engine's precision."""
    logprob_gap: float
    """Nats between sampling and training log-prob of one token beyond which something is wrong."""


class EngineLost(RuntimeError):
    """The engine cannot answer any more: restart it, sync it and submit again; equal keys make that safe."""


class RolloutEngine(Protocol):
    """Whoever samples completions for a policy. Every process of a run has one."""

    promises: Promises
    version: int
    """Of the policy that new requests meet: how many updates it has seen."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[Completion]]:
        """A future for each request, in order. Raises EngineLost, or its futures do."""
        ...

    def sync(self, weights: Weights, version: int, *, in_flight: Literal["wait", "continue"] = "wait") -> None:
        """Sample with these weights from now on. All processes call it. in_flight: whether requests under way end first."""
        ...

    def restart(self) -> None:
        """Make a lost engine usable again; it has no weights until `sync`."""
        ...

    def close(self) -> None: ...
