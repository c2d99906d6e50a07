"""Log-probabilities and entropies of tokens, in float32 or wider, of the distribution softmax(logits / temperature)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`. logits: (..., vocabulary), tokens: (...) -> (...)."""
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). (..., vocabulary) -> (...); a token of probability 0 adds 0."""
    logprobs = _scaled(logits, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def logprobs_and_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int = 4096,
) -> tuple[Tensor, Tensor | None]:
    """Token log-probs (and entropies) from hidden states, `chunk_tokens` at a time.

    The logits of all chunks, (rows, time, vocabulary), never exist at once: the backward pass recomputes each chunk's.

    Args:
        hidden: (rows, time, width).
        head: Maps hidden states to logits.
        tokens: (rows, time).
    """

    def one_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden)
        chosen = token_logprobs(logits, tokens, temperature=temperature)
        return chosen, entropy(logits, temperature=temperature) if with_entropy else None

    if tokens.numel() <= chunk_tokens:
        return one_chunk(hidden, tokens)
    flat_hidden, flat_tokens = hidden.flatten(0, 1), tokens.flatten()
    pieces = [
        checkpoint(one_chunk, h, t, use_reentrant=False)
        for h, t in zip(flat_hidden.split(chunk_tokens), flat_tokens.split(chunk_tokens), strict=True)
    ]
    logprobs = torch.cat([chosen for chosen, _ in pieces]).view_as(tokens)
    return logprobs, torch.cat([e for _, e in pieces]).view_as(tokens) if with_entropy else None
