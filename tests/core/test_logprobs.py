"""Log-probs and entropies against numbers worked out by hand, and chunked against whole."""

from math import log

import pytest
import torch

from rlhf.core.logprobs import entropy, logprobs_and_entropy, token_logprobs
from tests import broken
from tests.controls import names, refute
from tests.rounding import EPS

INF = float("inf")
# exp of the logits: 1, 2, 3. The probabilities are 1/6, 2/6, 3/6 at temperature 1 and 1/14, 4/14, 9/14 at temperature 1/2.
LOGITS = torch.tensor([[[0, log(2), log(3)]] * 3], dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, 2]])


def check_logprobs(token_logprobs) -> None:
    for temperature, probabilities in [(1.0, [1 / 6, 2 / 6, 3 / 6]), (0.5, [1 / 14, 4 / 14, 9 / 14])]:
        expected = torch.tensor([probabilities], dtype=torch.float64).log()
        result = token_logprobs(LOGITS, TOKENS, temperature=temperature)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_token_logprobs_are_those_of_softmax_of_logits_over_temperature():
    check_logprobs(token_logprobs)


LOGPROBS = [
    broken.logprobs_ignore_the_temperature,
    broken.logprobs_multiply_by_the_temperature,
    broken.logprobs_are_of_the_next_token,
    broken.logprobs_are_not_normalised,
]


@pytest.mark.parametrize("variant", LOGPROBS, ids=names(LOGPROBS))
def test_the_logprob_check_notices(variant):
    refute(check_logprobs, variant)


def check_entropy(entropy) -> None:
    """(1/2, 1/4, 1/4) has 1.5 log 2 nats; at temperature 1/2 it is (4, 1, 1) / 6; a token of probability 0 adds nothing."""
    logits = torch.tensor([log(2), 0, 0, -INF], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(entropy(logits).item(), 1.5 * log(2), rtol=0, atol=1e-12)
    sharper = -(4 / 6 * log(4 / 6) + 2 / 6 * log(1 / 6))
    torch.testing.assert_close(entropy(logits, temperature=0.5).item(), sharper, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(entropy(logits), logits)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    # dH/dlogit_i = -p_i (log p_i + H)
    torch.testing.assert_close(gradient[:3], -p * (p.log() + 1.5 * log(2)), rtol=0, atol=1e-12)
    assert gradient[3] == 0


def test_entropy_is_in_nats_and_survives_impossible_tokens():
    check_entropy(entropy)


ENTROPIES = [
    broken.entropy_has_the_wrong_sign,
    broken.entropy_ignores_the_temperature,
    broken.entropy_is_nan_at_probability_zero,
]


@pytest.mark.parametrize("variant", ENTROPIES, ids=names(ENTROPIES))
def test_the_entropy_check_notices(variant):
    refute(check_entropy, variant)


def test_the_gradient_of_a_logprob_is_one_hot_minus_probabilities_over_temperature():
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, TOKENS, temperature=0.5).sum().backward()
    expected = (torch.eye(3).double() - torch.tensor([1, 4, 9]).double() / 14) / 0.5
    torch.testing.assert_close(logits.grad[0], expected, rtol=0, atol=1e-12)


def test_an_impossible_token_has_log_probability_minus_infinity():
    logits = torch.tensor([[0.0, -INF]])
    assert token_logprobs(logits, torch.tensor([1])) == -INF and token_logprobs(logits, torch.tensor([0])) == 0


def test_half_precision_logits_are_reduced_in_float32():
    """In bfloat16 itself, log(2**16) = 11.09 would be rounded to 11.0625."""
    logits = torch.zeros(1, 2**16, dtype=torch.bfloat16)
    result = token_logprobs(logits, torch.tensor([7]))
    assert result.dtype == torch.float32 and result.item() == pytest.approx(-16 * log(2), abs=256 * EPS)
    assert entropy(logits).item() == pytest.approx(16 * log(2), abs=1024 * EPS)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(
        -1 - log(1 + 1 / torch.e), abs=16 * EPS * 1e4
    )


# --- chunks ---


def model(seed: int = 0):
    torch.manual_seed(seed)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 7, (3, 5))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 14, 15, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens, temperature):
    """Against log_softmax of all logits at once, with a random weight for each element."""
    hidden, weight, tokens = model()
    whole = (hidden @ weight.T / temperature).log_softmax(-1)
    logprobs = whole.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropies = -(whole.exp() * whole).sum(-1)
    per_element = torch.randn(3, 5, dtype=torch.float64)
    wanted = torch.autograd.grad((per_element * (logprobs - 0.3 * entropies)).sum(), (hidden, weight))

    result, entropy_result = logprobs_and_entropy(
        hidden, lambda h: h @ weight.T, tokens, temperature=temperature, with_entropy=True, chunk_tokens=chunk_tokens
    )
    gradients = torch.autograd.grad((per_element * (result - 0.3 * entropy_result)).sum(), (hidden, weight))
    for ours, theirs in zip((result, entropy_result, *gradients), (logprobs, entropies, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_logits_of_the_whole_batch_never_exist():
    """The head is asked for at most `chunk_tokens` positions at a time, in the forward and again in the backward pass."""
    hidden, weight, tokens = model()
    seen: list[int] = []

    def head(h):
        seen.append(h[..., 0].numel())
        return h @ weight.T

    logprobs, no_entropy = logprobs_and_entropy(hidden, head, tokens, chunk_tokens=4)
    assert no_entropy is None and max(seen) == 4 and sum(seen) == 15
    logprobs.sum().backward()
    assert max(seen) == 4 and sum(seen) == 30
