"""A language with 15 sentences, small enough to know everything about it.

Vocabulary 3, token 0 ends a sentence, at most 3 tokens: 15 sequences over 7 prefixes, the states. A policy is a table
theta[prefix, token] of logits; every expectation is a finite sum and can be differentiated. Reward R(y) is given once, at
the end of the sequence; the objective is J = E[R] - beta KL(policy || reference), whose optimum is known:
pi*(y) = ref(y) exp(R(y) / beta) / Z.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

VOCABULARY, EOS, MAX_TOKENS = 3, 0, 3

PREFIXES = [prefix for length in range(MAX_TOKENS) for prefix in product((1, 2), repeat=length)]
SEQUENCES = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(VOCABULARY)
    if token == EOS or len(prefix) == MAX_TOKENS - 1
]
assert len(PREFIXES) == 7 and len(SEQUENCES) == 15

LENGTHS = torch.tensor([len(sequence) for sequence in SEQUENCES])
MASK = torch.arange(MAX_TOKENS) < LENGTHS.unsqueeze(1)
"""(15, 3) bool: True on the tokens of each sequence, its EOS included."""
TOKENS = torch.tensor([[*sequence, 0, 0][:MAX_TOKENS] for sequence in SEQUENCES])
"""(15, 3), 0 behind the end."""
STATES = torch.tensor([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(MAX_TOKENS)] for s in SEQUENCES])
"""(15, 3): which prefix stands before each token."""
ENDS = torch.arange(MAX_TOKENS) == (LENGTHS - 1).unsqueeze(1)
"""(15, 3) bool: True on the last token of each sequence."""


def token_logprobs(theta: Tensor) -> Tensor:
    """(7, 3) logits -> (15, 3) log-prob of every token of every sequence, 0 behind the end."""
    return torch.where(MASK, theta.log_softmax(-1)[STATES, TOKENS], 0.0)


def sequence_logprobs(theta: Tensor) -> Tensor:
    """(7, 3) logits -> (15,)."""
    return token_logprobs(theta).sum(-1)


def expected(theta: Tensor, values: Tensor) -> Tensor:
    """The exact mean over the policy's sequences of `values`, (15,) or (15, n)."""
    return torch.tensordot(sequence_logprobs(theta).exp(), values, 1)


def kl(logprobs: Tensor, other: Tensor) -> Tensor:
    """KL between two distributions over the 15 sequences, given as log-probs; the first one samples."""
    return (logprobs.exp() * (logprobs - other)).sum()


@dataclass(frozen=True)
class Problem:
    """What is to be learnt: the reference's logits (7, 3), the reward of each sequence (15,), the price of divergence."""

    reference: Tensor
    rewards: Tensor
    beta: float = 0.37

    def objective(self, theta: Tensor) -> Tensor:
        return expected(theta, self.rewards) - self.beta * kl(
            sequence_logprobs(theta), sequence_logprobs(self.reference)
        )

    def optimum(self) -> Tensor:
        """Log-probs of pi* over the 15 sequences."""
        return (sequence_logprobs(self.reference) + self.rewards / self.beta).log_softmax(-1)

    def best_objective(self) -> Tensor:
        """J* = beta log Z."""
        return self.beta * (sequence_logprobs(self.reference) + self.rewards / self.beta).logsumexp(-1)

    def soft_values(self) -> tuple[Tensor, Tensor]:
        """V* (7,) and Q* (7, 3), backwards: V*(s) = beta log sum_a ref(a|s) exp(Q*(s, a) / beta), 0 after the end."""
        value, action_value = torch.zeros(7).double(), torch.zeros(7, 3).double()
        logref = self.reference.log_softmax(-1)
        for state in reversed(range(7)):
            for token in range(VOCABULARY):
                following = (*PREFIXES[state], token)
                ends = following in SEQUENCES
                action_value[state, token] = (
                    self.rewards[SEQUENCES.index(following)] if ends else value[PREFIXES.index(following)]
                )
            value[state] = self.beta * (logref[state] + action_value[state] / self.beta).logsumexp(-1)
        return value, action_value

    def best_logits(self) -> Tensor:
        """pi*(token | prefix) as logits (7, 3): log ref + (Q* - V*) / beta."""
        value, action_value = self.soft_values()
        return self.reference.log_softmax(-1) + (action_value - value.unsqueeze(1)) / self.beta


def random_problem(seed: int = 0) -> tuple[Problem, Tensor]:
    """A random problem in float64 and the logits (7, 3) of a random policy."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Problem(reference=normal(7, 3), rewards=normal(15)), normal(7, 3)
