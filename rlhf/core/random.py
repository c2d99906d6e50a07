"""Stateless random numbers: every draw is a pure function of (seed, stream, counters).

There is no generator state, so no draw depends on the rank, on the batch that a row is in, or on an interruption.
Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), checked against the published
vectors.
"""

import torch
from torch import Tensor

# Streams: one per purpose, so that draws for different purposes differ.
SAMPLING, DATA_ORDER, MINIBATCH, ACTIONS, ENV_RESET, EVALUATION = 1, 2, 3, 4, 5, 6

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * constant (both below 2**32), multiplied in halves so that int64 does not overflow."""
    with_low, with_high = a * (constant & 0xFFFF), a * (constant >> 16)
    high = (with_high + (with_low >> 16)) >> 16
    low = (with_low + ((with_high & 0xFFFF) << 16)) & _LOW
    return high, low


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32 from a counter and a key: four words below 2**32, as int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seed: int, stream: int, *counters: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, float64, of the counters' broadcast shape.

    seed: 0 <= seed < 2**32. counters: up to four integers below 2**32, or int64 tensors of such integers, for example
    (step, prompt slot, completion, token position).
    """
    if not 0 <= seed <= _LOW:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    if len(counters) > 4:
        raise ValueError(f"a draw has at most 4 counters, got {len(counters)}: the others would be ignored")
    device = next((c.device for c in counters if isinstance(c, Tensor)), None)
    words = [torch.as_tensor(c, dtype=torch.int64, device=device) for c in (*counters, 0, 0, 0, 0)[:4]]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    first, second, _, _ = philox((c0, c1, c2, c3), (seed, stream))
    return ((first >> 5).double() * 2.0**26 + (second >> 6).double()) / 2.0**53


def permutation(size: int, seed: int, stream: int, *counters: int | Tensor) -> Tensor:
    """A permutation of 0 .. size - 1, (size,) int64 on the CPU, keyed by up to three integers such as (step, epoch).

    A counter of shape (n,) gives n permutations at once, (n, size): row i is the one that element i alone would give.
    """
    keys = [counter.unsqueeze(-1) if isinstance(counter, Tensor) else counter for counter in counters]
    return uniform(seed, stream, torch.arange(size), *keys).argsort(dim=-1, stable=True)


def invert_cdf(logits: Tensor, draw: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Samples from softmax(logits / temperature), given uniform numbers: (rows, choices), (rows,) -> (rows,) int64.

    A sample is the first choice whose cumulative probability, in float64, exceeds the draw; never one of probability 0.
    NaN logits give the last choice, whose log-prob is also NaN and stops the run.
    """
    wide = logits.double()
    cumulative = (wide if temperature == 1.0 else wide / temperature).softmax(-1).cumsum(-1)
    target = draw * cumulative[:, -1]  # below the total: a draw is at most 1 - 2**-53, and the total about 1
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)
