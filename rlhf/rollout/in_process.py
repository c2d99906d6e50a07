"""The engine that samples with the training model itself: KV cache, one prefill per prompt, ended rows are dropped.

Every draw is a pure function of its key (seed, stream, step, prompt slot, completion, turn) and position, so a completion
does not depend on its batch, its process or earlier draws. Log-probs come from the forward pass that sampled the token.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.core.logprobs import token_logprobs
from rlhf.core.random import invert_cdf, uniform
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.models.policy import Policy
from rlhf.rollout.engine import Completion, Key, Promises, Request, Sampling, Span, Weights

EXACT = Promises(stateless=True, exact=True, logprob_gap=0.01)
"""For arithmetic in float32 or wider. The gap is 100 times the rounding error observed with peaked distributions."""
ROUGH = Promises(stateless=True, exact=False, logprob_gap=1.0)
"""For arithmetic in bfloat16 or TensorFloat32, which rounds differently in prefill, decoding and training: by about
0.05 nats with a small model, more for unlikely tokens of a large one."""
LARGEST_TURN = 2**20
"""Random-number counters reserved for each turn, one per token position."""


class _Group(NamedTuple):
    """Requests for completions of one prompt."""

    ids: Sequence[int]
    requests: list[Request]


class InProcessEngine:
    """A `RolloutEngine` that samples with the policy in this process and therefore always has its current weights."""

    def __init__(self, policy: Policy, distributed: Distributed, *, completions_at_once: int = 256) -> None:
        """distributed: gives the precision and device of the policy. completions_at_once: completions sampled in
        parallel; affects memory and speed only.

        Raises InputError if the completions of a prompt cannot share the model's cache.
        """
        check_cache(policy.lm)
        self.policy = policy
        self.distributed = distributed
        self.completions_at_once = completions_at_once
        narrow = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in policy.lm.parameters())
        full = distributed.precision == "float32" and not narrow and not _multiplies_in_tf32(distributed.device)
        self.promises = EXACT if full else ROUGH
        self.version = 0

    @torch.no_grad()
    def submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Future[Completion]]:
        """Samples before it returns. Adjacent requests whose keys differ only in `copy` share one prefill."""
        groups = [_Group(members[0].ids, members) for members in _adjacent(requests)]
        futures: list[Future[Completion]] = []
        with self.distributed.autocast():
            for size, alike in groupby(groups, key=lambda group: len(group.requests)):
                of_size = list(alike)
                at_once = max(1, self.completions_at_once // size)
                for start in range(0, len(of_size), at_once):
                    for completion in self._sample(of_size[start : start + at_once], sampling):
                        futures.append(Future())
                        futures[-1].set_result(completion)
        return futures

    def sync(self, weights: Weights, version: int, *, in_flight: Literal["wait", "continue"] = "wait") -> None:
        self.version = version  # the weights are the policy's own

    def restart(self) -> None: ...
    def close(self) -> None: ...

    def _sample(self, groups: list[_Group], sampling: Sampling) -> list[Completion]:
        """Sample one batch. All groups have the same number of requests."""
        lm = self.policy.lm
        size = len(groups[0].requests)
        device = lm.device
        requests = [request for group in groups for request in group.requests]
        limits = [request.max_new_tokens or sampling.max_new_tokens for request in requests]  # never 0
        draws = _Draws([request.key for request in requests], device)
        ids, attention = left_pad([group.ids for group in groups], device)
        cache = DynamicCache(config=lm.config)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)  # position ids must not count the padding
        outputs = self.policy.decode(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(size)
        logits = outputs.logits[:, -1].repeat_interleave(size, 0)
        attention = attention.repeat_interleave(size, 0)
        position = attention.sum(-1)
        found = _Found(limits, sampling.end_ids, logits)
        while True:
            chosen = logits.argmax(-1) if sampling.greedy else draws.sample(logits, found, sampling.temperature)
            goes_on = found.add(chosen, token_logprobs(logits, chosen, temperature=sampling.temperature))
            if not len(found.alive):
                return found.completions(self.version)
            if len(found.alive) < len(chosen):  # drop ended rows from the cache to save compute
                cache.batch_select_indices(goes_on)
                chosen, attention, position = (x[goes_on] for x in (chosen, attention, position))
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
            outputs = self.policy.decode(
                input_ids=chosen.unsqueeze(1),
                attention_mask=attention,
                position_ids=position.unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            )
            logits = outputs.logits[:, -1]
            position = position + 1


class _Draws:
    """Random draws for the rows of a batch."""

    def __init__(self, keys: Sequence[Key], device: torch.device) -> None:
        streams = {(key.seed, key.stream) for key in keys}
        if len(streams) > 1:
            raise ValueError("The requests of one submission must share seed and stream: submit the others separately.")
        self.seed, self.stream = streams.pop()

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        self.step = column([key.step for key in keys])
        self.slot = column([key.slot for key in keys])
        self.copy = column([key.copy for key in keys])
        self.start = column([key.turn * LARGEST_TURN for key in keys])

    def sample(self, logits: Tensor, found: "_Found", temperature: float) -> Tensor:
        """Draw the next token of each row that has not ended."""
        rows = found.alive
        counters = (self.start[rows] + found.length, self.copy[rows], self.slot[rows], self.step[rows])
        return invert_cdf(logits, uniform(self.seed, self.stream, *counters), temperature=temperature)


class _Found:
    """The tokens and log-probs sampled so far, row by row."""

    def __init__(self, limits: Sequence[int], end_ids: Sequence[int], logits: Tensor) -> None:
        device = logits.device
        rows = len(limits)
        longest = max(limits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        self.limits = torch.tensor(limits, device=device)
        self.end_ids = torch.tensor(list(end_ids), device=device)
        self.tokens = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, longest, dtype=wide, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.alive = torch.arange(rows, device=device)
        """Indices of the rows that have not ended."""
        self.length = 0
        """Tokens sampled so far in each of those rows."""

    def add(self, chosen: Tensor, logprobs: Tensor) -> Tensor:
        """Store the next token of each row in `alive`, and drop the rows that end. Returns the indices, within the
        previous `alive`, of the rows that remain."""
        rows = self.alive
        place = self.length
        self.tokens[rows, place] = chosen
        self.logprobs[rows, place] = logprobs
        self.length = place + 1
        self.lengths[rows] = self.length
        stops = torch.isin(chosen, self.end_ids)
        self.stopped[rows] = stops
        goes_on = (~stops & (self.limits[rows] > self.length)).nonzero().squeeze(1)
        self.alive = rows[goes_on]
        return goes_on

    def completions(self, version: int) -> list[Completion]:
        columns = (self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), self.stopped.tolist())
        return [
            Completion(ids[:n], values[:n], "stop" if stopped else "length", [Span(version, 0, n)])
            for ids, values, n, stopped in zip(*columns, strict=True)
        ]


def _adjacent(requests: Sequence[Request]) -> list[list[Request]]:
    """Group adjacent requests that have the same prompt and whose keys differ only in `copy`."""
    members = groupby(requests, key=lambda request: (tuple(request.ids), request.key._replace(copy=0)))
    return [list(group) for _, group in members]


def _multiplies_in_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), each int64 of shape (rows, longest prompt); every prompt ends in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention


def check_cache(lm: PreTrainedModel) -> None:
    """Raise InputError unless the cache of every layer can drop ended rows and share one prefill among completions."""
    layers = DynamicCache(config=lm.config).layers
    if getattr(lm, "_is_stateful", False) or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        raise InputError(
            f"policy: {type(lm).__name__} keeps a recurrent state, which completions cannot share or drop row by row. "
            "Use a model with attention in every layer."
        )
