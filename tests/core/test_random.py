"""Stateless randomness: published vectors, and that a draw depends on nothing but its counters."""

import pytest
import torch

from rlhf.core.random import (
    ACTIONS,
    DATA_ORDER,
    ENV_RESET,
    EVALUATION,
    MINIBATCH,
    SAMPLING,
    permutation,
    philox,
    uniform,
)

ONES = 0xFFFFFFFF
# The three known answers for philox4x32 with 10 rounds that Random123 publishes: zeros, ones, and the digits of pi.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_all_known_answers_come_from_one_vectorised_call_too():
    """Three counters at once under one key, against Python's own unbounded integers."""
    counters = torch.tensor([c for c, _, _ in KNOWN_ANSWERS]).T
    words = torch.stack(philox(tuple(counters), (7, 11)))
    for column, (counter, _, _) in enumerate(KNOWN_ANSWERS):
        assert words[:, column].tolist() == list(_philox_in_python(counter, (7, 11)))


def _philox_in_python(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & ONES, (first >> 32) ^ c3 ^ k1, first & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def test_uniform_uses_53_bits_of_philox_and_lies_in_the_unit_interval():
    """The largest number is 1 - 2**-53, so inverting a CDF can never run over its end."""
    draws = uniform(3, SAMPLING, torch.arange(10_000))
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    scaled = draws * 2.0**53
    assert torch.equal(scaled, scaled.round()) and (scaled.long() % 2).any()


def test_uniform_is_uniform():
    """50,000 draws: mean 1/2 and variance 1/12 within four standard errors, 20 equal bins by a chi-square of 19 degrees."""
    draws = uniform(0, SAMPLING, torch.arange(100).unsqueeze(1), torch.arange(500)).flatten()
    n = draws.numel()
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = torch.bincount((draws * 20).long(), minlength=20)
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # p = 1e-4


def test_neighbouring_counters_are_uncorrelated():
    grid = uniform(0, SAMPLING, torch.arange(200).unsqueeze(1), torch.arange(200)) - 0.5
    for a, b in [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])]:
        correlation = (a * b).mean() * 12
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_a_draw_does_not_depend_on_the_batch_it_sits_in():
    whole = uniform(5, SAMPLING, 2, torch.arange(6).unsqueeze(1), torch.arange(4))
    assert whole.shape == (6, 4)
    for row in range(6):
        for column in range(4):
            assert uniform(5, SAMPLING, 2, row, column) == whole[row, column]
    shuffled = torch.tensor([3, 0, 5])
    assert torch.equal(uniform(5, SAMPLING, 2, shuffled.unsqueeze(1), torch.arange(4)), whole[shuffled])


def test_torchs_generator_is_neither_used_nor_advanced():
    before = torch.random.get_rng_state()
    first = uniform(0, SAMPLING, torch.arange(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(uniform(0, SAMPLING, torch.arange(5)), first)


def test_seed_stream_and_every_counter_change_the_draw():
    base = {"seed": 1, "stream": SAMPLING, "counters": (2, 3, 4, 5)}
    draws = {float(uniform(base["seed"], base["stream"], *base["counters"]))}
    draws.add(float(uniform(2, SAMPLING, 2, 3, 4, 5)))
    draws.add(float(uniform(1, ACTIONS, 2, 3, 4, 5)))
    for place in range(4):
        counters = [2, 3, 4, 5]
        counters[place] += 1
        draws.add(float(uniform(1, SAMPLING, *counters)))
    assert len(draws) == 7


def test_the_streams_are_six_different_ones():
    assert len({SAMPLING, DATA_ORDER, MINIBATCH, ACTIONS, ENV_RESET, EVALUATION}) == 6


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_not_fit_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed .*2\*\*32"):
        uniform(seed, SAMPLING, 0)


def test_a_counter_too_many_is_refused_instead_of_ignored():
    with pytest.raises(ValueError, match="at most 4 counters, got 5"):
        uniform(0, SAMPLING, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_permutation_is_one(size):
    order = permutation(size, 0, DATA_ORDER, 3)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(size))


def test_permutations_of_other_epochs_steps_and_seeds_differ():
    orders = {
        tuple(permutation(20, *key).tolist())
        for key in [(0, 3, 0, 0), (0, 3, 0, 1), (0, 3, 1, 0), (1, 3, 0, 0), (0, 2, 0, 0)]
    }
    assert len(orders) == 5


def test_several_permutations_at_once_are_those_of_each_key_alone():
    together = permutation(9, 1, MINIBATCH, 5, torch.arange(4))
    assert together.shape == (4, 9)
    for epoch in range(4):
        assert torch.equal(together[epoch], permutation(9, 1, MINIBATCH, 5, epoch))


def test_every_permutation_is_equally_likely():
    """The 6 orders of 3 elements over 600 keys: chi-square of 5 degrees below 26 (p = 1e-4)."""
    counts: dict[tuple[int, ...], int] = {}
    for key in range(600):
        order = tuple(permutation(3, 0, MINIBATCH, key).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and sum((count - 100) ** 2 / 100 for count in counts.values()) < 26
