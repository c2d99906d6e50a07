"""An engine that samples nothing: it replays tokens and log-probs that were written down, found by prompt and key."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollout.engine import Completion, Promises, Request, Sampling, Span

Script = Callable[[Request, Sampling], tuple[list[int], list[float]]]
"""Tokens and log-probs for a request, as many as there are; the engine cuts them at an end token or the limit."""


@dataclass
class ScriptedEngine:
    """A `RolloutEngine` that knows no model. `asked` and `synced` remember what it was told."""

    script: Script
    promises: Promises = Promises(stateless=True, exact=True, logprob_gap=0.1)  # noqa: RUF009
    version: int = -1
    asked: list[Request] = field(default_factory=list)
    synced: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    restarts: int = 0

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[Completion]]:
        assert self.version >= 0, "sync comes first"
        futures: list[Future[Completion]] = []
        for request in requests:
            self.asked.append(request)
            ids, logprobs = self.script(request, sampling)
            limit = request.max_new_tokens or sampling.max_new_tokens
            end = next((place + 1 for place, token in enumerate(ids[:limit]) if token in sampling.end_ids), None)
            n = limit if end is None else end
            assert len(ids) >= n, "the script is too short"
            span = Span(self.version, 0, n)
            futures.append(Future())
            futures[-1].set_result(Completion(ids[:n], logprobs[:n], "length" if end is None else "stop", [span]))
        return futures

    def sync(self, weights, version, *, in_flight="wait") -> None:
        self.version = version
        self.synced.append((version, {name: tensor.detach().clone() for name, tensor in weights()}))

    def restart(self) -> None:
        self.restarts += 1
        self.version = -1

    def close(self) -> None: ...
