"""Dynamic sampling: which groups a step trains on. Sources of prompts are scripted; no model is needed."""

from dataclasses import replace
from itertools import product

import pytest

from rlhf.data.prompts import Prompt
from rlhf.rollout.groups import sample_informative
from rlhf.rollout.sampled import Sampled
from tests.rollout.episodes import episode
from tests.rollout.episodes import sampled as sampled_with


class Scripted:
    """A source of prompts whose groups of two are informative as `pattern` says, by slot; the last entry goes on."""

    def __init__(self, pattern: tuple[bool, ...]) -> None:
        self.pattern, self.asked = pattern, []

    def __call__(self, first: int, number: int) -> Sampled:
        self.asked.append((first, number))
        slots = range(first, first + number)
        informative = [self.pattern[min(slot, len(self.pattern) - 1)] for slot in slots]
        scores = [score for told in informative for score in ((1.0, 0.0) if told else (1.0, 1.0))]
        made = sampled_with([episode([3], [3]) for _ in scores], scores, per_function={"verdict": list(scores)})
        return replace(
            made,
            prompts=[Prompt([3], f"prompt {slot}", {}) for slot in slots for _ in range(2)],
            row_index=[2 * slot + copy for slot in slots for copy in range(2)],
        )


def sampled(source: Scripted, distributed, count: int, rounds: int) -> tuple[list[int], int]:
    """The slots of the chosen groups, and how many prompts were used."""
    rollout, everything, used = sample_informative(
        source, count=count, rounds=rounds, size=2, verdict="verdict", distributed=distributed
    )
    assert rollout.row_index == list(range(2 * count)) and len(everything) == len(source.asked)
    names = [prompt.prompt for prompt in rollout.prompts]
    assert names[::2] == names[1::2]
    return [int(name.split()[1]) for name in names[::2]], used


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_sampling_stops_with_enough_informative_groups_or_after_the_last_round(rounds, distributed):
    """Every pattern of seven groups, three wanted: the first informative ones are taken, then the first of the others."""
    count = 3
    for pattern in product([False, True], repeat=7):
        source = Scripted((*pattern, False))
        slots, used = sampled(source, distributed, count, rounds)
        seen = [slot < 7 and pattern[slot] for slot in range(used)]
        informative = [slot for slot in range(used) if seen[slot]]
        others = [slot for slot in range(used) if not seen[slot]]
        assert slots == sorted((informative + others)[:count])
        assert source.asked[0] == (0, count) and len(source.asked) <= rounds
        for (first, number), (after, _) in zip(source.asked, [*source.asked[1:], (used, 0)], strict=True):
            assert first + number == after and 1 <= number <= count  # no slot twice, none left out
        before = sum(seen[: source.asked[-1][0]])
        assert before < count or len(source.asked) == 1  # the last round was needed
        assert len(informative) >= count or len(source.asked) == rounds  # and no further one


def test_groups_without_information_fill_the_step_when_the_rounds_are_used_up(distributed):
    source = Scripted((False,))
    assert sampled(source, distributed, 4, 3) == ([0, 1, 2, 3], 12)
    assert source.asked == [(0, 4), (4, 4), (8, 4)]


def test_later_rounds_ask_for_as_many_prompts_as_the_share_so_far_makes_necessary(distributed):
    """1 of 4 is informative, 3 are missing: 12, so 4 (the most of a round); then 2 of 8, 2 missing: 8, so 4; ..."""
    source = Scripted((True, False, False, False, True, True, True, False))
    assert sampled(source, distributed, 4, 9) == ([0, 4, 5, 6], 8)
    source = Scripted((True, True, True, False, True))
    assert sampled(source, distributed, 4, 9) == ([0, 1, 2, 4], 6)  # one missing, 3 of 4: 4/3, so 2
    assert source.asked == [(0, 4), (4, 2)]


class OneOfFour:
    """A group of four processes as the one sees it that is given all the prompts."""

    world_size, rank = 4, 0

    def share(self, count: int) -> range:
        return range(count)

    def gather_objects(self, items: list) -> list:
        return items


def test_what_is_sampled_does_not_depend_on_the_number_of_processes(distributed):
    """Five groups, four found: two more prompts are enough, also for four processes, two of which have none then."""
    asked = []
    for group in (distributed, OneOfFour()):
        source = Scripted((True, True, True, True, False, True, True))
        assert sampled(source, group, 5, 9) == ([0, 1, 2, 3, 5], 7)
        asked.append(source.asked)
    assert asked == [[(0, 5), (5, 2)]] * 2
