"""Sampling completions with the training model itself: a KV cache, one prefill per prompt, ended rows dropped.

Every draw is a pure function of (seed, stream, step, prompt slot, completion, position), so a completion does not depend on
the batch, the process or the history in which it is sampled; log-probs come from the pass that sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.core.logprobs import token_logprobs
from rlhf.core.random import invert_cdf, uniform
from rlhf.errors import InputError
from rlhf.settings import check_types


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


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """Tokens, the end-of-sequence token included if it came."""
    logprobs: list[float]
    """Log-prob of each token under softmax(logits / temperature) when it was sampled."""
    ended: bool
    """True: by its end-of-sequence token. False: cut by max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Names the random numbers of one call: completion c of prompt slot s at position t draws (step, s, c, t)."""

    seed: int
    stream: int
    step: int
    slots: Sequence[int]
    """The place of each prompt in the global step."""


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    draws: Draws,
    eos_ids: Sequence[int],
    num_completions: int = 1,
    greedy: bool = False,
) -> list[Completion]:
    """`num_completions` completions of each prompt, those of one prompt adjacent. `greedy` takes the likeliest token."""
    prompts_at_once = max(1, config.completions_at_once // num_completions)
    completions: list[Completion] = []
    for start in range(0, len(prompts), prompts_at_once):
        part = slice(start, start + prompts_at_once)
        slots = torch.tensor(draws.slots[part], device=lm.device).repeat_interleave(num_completions)
        completions += _generate_batch(lm, prompts[part], slots, config, draws, eos_ids, num_completions, greedy)
    return completions


def _generate_batch(
    lm: PreTrainedModel,
    prompts: Sequence[list[int]],
    slots: Tensor,
    config: GenerationConfig,
    draws: Draws,
    eos_ids: Sequence[int],
    num_completions: int,
    greedy: bool,
) -> list[Completion]:
    device, rows = lm.device, len(prompts) * num_completions
    ids, attention = left_pad(prompts, device)
    cache = DynamicCache(config=lm.config)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)  # absolute positions must not count the padding
    outputs = lm(
        input_ids=ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(num_completions)
    logits = outputs.logits[:, -1].repeat_interleave(num_completions, 0)
    attention = attention.repeat_interleave(num_completions, 0)
    position = attention.sum(-1)
    copies = torch.arange(num_completions, device=device).repeat(len(prompts))
    eos = torch.tensor(list(eos_ids), device=device)
    tokens = torch.zeros(rows, config.max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(
        rows, config.max_new_tokens, dtype=torch.promote_types(logits.dtype, torch.float32), device=device
    )
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    for t in range(config.max_new_tokens):
        if greedy:
            chosen = logits.argmax(-1)
        else:
            draw = uniform(draws.seed, draws.stream, t, copies[alive], slots[alive], draws.step)
            chosen = invert_cdf(logits, draw, temperature=config.temperature)
        tokens[alive, t] = chosen
        logprobs[alive, t] = token_logprobs(logits, chosen, temperature=config.temperature)
        lengths[alive] = t + 1
        stops = torch.isin(chosen, eos)
        ended[alive] = stops
        goes_on = (~stops).nonzero().squeeze(1)
        if t + 1 == config.max_new_tokens or len(goes_on) == 0:
            break
        if len(goes_on) < len(alive):  # rows that ended leave the cache and cost nothing more
            cache.batch_select_indices(goes_on)
            alive, chosen, attention, position = (x[goes_on] for x in (alive, chosen, attention, position))
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
        outputs = lm(
            input_ids=chosen.unsqueeze(1),
            attention_mask=attention,
            position_ids=position.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
        logits, position = outputs.logits[:, -1], position + 1
    columns = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    return [Completion(ids[:n], values[:n], done) for ids, values, n, done in columns]


def left_pad(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), (rows, longest) int64 each: every prompt ends in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention


def check_cache(lm: PreTrainedModel) -> None:
    """Ended rows leave the cache and one prefill serves several completions: every layer's cache must allow it."""
    layers = DynamicCache(config=lm.config).layers
    if getattr(lm, "_is_stateful", False) or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        raise InputError(
            f"policy: {type(lm).__name__} keeps a recurrent state, which generation here cannot share or drop by rows. "
            "Use a model with attention in every layer."
        )


def end_tokens(lm: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """The token ids that end a completion: the tokenizer's and those of the model's generation settings."""
    configured = getattr(lm.generation_config, "eos_token_id", None) if lm.generation_config is not None else None
    candidates = [*(configured if isinstance(configured, list) else [configured]), tokenizer_eos]
    ids = {i for i in candidates if i is not None}
    if not ids:
        raise InputError(
            "tokenizer: it has no end-of-sequence token, so completions could never end. Set tokenizer.eos_token."
        )
    return sorted(ids)
