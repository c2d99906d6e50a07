"""How the tests prove themselves, and how they imitate several processes.

A test that a broken function would also pass proves nothing. So an expectation is written as `check(function)`, called once
with the real function and once, through `refute`, with each broken one of tests/broken.py.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from rlhf.core.masking import AllSum


def refute(check: Callable[[Any], None], broken: Any) -> None:
    """The very same check must fail on the broken variant."""
    with pytest.raises(AssertionError):
        check(broken)


def names(variants: list[Callable[..., Any]]) -> list[str]:
    """Test ids of broken variants: what each of them does wrong."""
    return [variant.__name__ for variant in variants]


def run_ranks(work: Callable[[int, AllSum], Any], world_size: int) -> list[Any]:
    """`work(rank, all_sum)` on `world_size` threads whose `all_sum` really adds over them; the results in order of rank."""
    barrier = threading.Barrier(world_size, timeout=30)
    posted: list[Tensor | None] = [None] * world_size
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        def all_sum(values: Tensor) -> Tensor:
            posted[rank] = values
            barrier.wait()
            total = sum(tensor for tensor in posted if tensor is not None)
            barrier.wait()
            return total  # type: ignore[return-value]

        results[rank] = work(rank, all_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
