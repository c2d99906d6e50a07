"""What a reward function logs can be written and read back, or is refused with its name before anything is learnt."""

import enum
import json
from collections import OrderedDict
from datetime import datetime
from fractions import Fraction

import numpy as np
import pytest
import torch

from rlhf import InputError, isolated
from rlhf.rewards.combine import Rewards
from rlhf.rewards.logged import DEPTH
from rlhf.runs.jsonlines import JsonLines, encoded, read_metrics
from tests import tiny
from tests.rewards.batch import call

WHERE = {"here": lambda function: function, "isolated": isolated}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def circular() -> list:
    value: list = [1]
    value += [value, value]
    return value


class Raises:
    def __repr__(self):
        raise RuntimeError("no repr")


class Grade(enum.StrEnum):
    GOOD = "good"


class Level(enum.IntEnum):
    HIGH = 3


UNWRITABLE = {
    "lone surrogate": lambda: "a\ud800",
    "key with a lone surrogate": lambda: {"\ud800": 1},
    "tuple key": lambda: {(1, 2): 3},
    "integer key": lambda: {1: 2},
    "circular list": circular,
    "one level too many": lambda: nested(DEPTH + 1),
    "absurdly deep": lambda: nested(100_000),
    "nan": lambda: float("nan"),
    "nan in a list": lambda: [0.0, float("nan")],
    "inf": lambda: {"a": float("-inf")},
    "nan of numpy": lambda: np.float32("nan"),
    "nan of torch": lambda: torch.tensor(float("nan")),
    "integer of 5000 digits": lambda: 10**5000,
    "complex": lambda: 1j,
    "complex of numpy": lambda: np.complex64(1j),
    "bytes": lambda: b"a",
    "set": lambda: {1},
    "tensor": lambda: torch.zeros(2),
    "array": lambda: np.zeros(2),
    "date": lambda: datetime(2026, 1, 1),
    "date of numpy": lambda: np.datetime64("2026-01-01"),
    "object": object,
    "object without a repr": Raises,
    "function": lambda: print,
    "generator": lambda: (i for i in range(3)),
}

WRITABLE = {
    "none": (None, None),
    "bool": (True, True),
    "int": (3, 3),
    "float": (0.1, 0.1),
    "text": ("ä ✓\n", "ä ✓\n"),
    "float32": (np.float32(0.5), 0.5),
    "float64": (np.float64(0.1), 0.1),
    "int64": (np.int64(7), 7),
    "bool of numpy": (np.bool_(True), True),
    "0-d array": (np.array(2.5), 2.5),
    "0-d tensor": (torch.tensor(2.5), 2.5),
    "0-d bfloat16": (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
    "0-d integer tensor": (torch.tensor(4), 4),
    "fraction": (Fraction(1, 4), 0.25),
    "enumeration of text": (Grade.GOOD, "good"),
    "enumeration of integers": (Level.HIGH, 3),
    "list": ([1, [np.float32(2), "a"], None], [1, [2.0, "a"], None]),
    "tuple": ((1, (2,)), [1, [2]]),
    "dictionary": ({"kind": "a", "text": torch.tensor(1)}, {"kind": "a", "text": 1}),
    "ordered": (OrderedDict(a=[1]), {"a": [1]}),
    "the same list twice": ([[1]] * 2, [[1], [1]]),
    "as deep as can be": (nested(DEPTH), nested(DEPTH)),
}


def judge_of(tool: str, name, value):
    def judge(completions, log_extra, log_metric):
        if tool == "log_extra":
            log_extra(name, [None, value(), *[None] * (len(completions) - 2)])
        else:
            log_metric(name, value())
        return [0.0] * len(completions)

    return judge


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_value_that_json_cannot_hold_is_refused_with_the_functions_name_and_the_row(kind, where):
    judge = WHERE[where](judge_of("log_extra", "mine", UNWRITABLE[kind]))
    with pytest.raises(
        InputError, match=r"Reward function 'judge': log_extra\('mine'\) got for row 1 .*Give None, finite"
    ):
        call(Rewards(judge))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", [kind for kind in UNWRITABLE if kind != "integer of 5000 digits"])
def test_a_metric_that_is_no_finite_number_is_refused_with_the_functions_name(kind, where):
    judge = WHERE[where](judge_of("log_metric", "mine", UNWRITABLE[kind]))
    with pytest.raises(InputError, match=r"Reward function 'judge': log_metric\('mine'\) got .*Give a finite number"):
        call(Rewards(judge))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", WRITABLE)
def test_what_json_can_hold_comes_back_from_both_processes(kind, where, tmp_path):
    value, read = WRITABLE[kind]
    judge = WHERE[where](judge_of("log_extra", "mine", lambda: value))
    extra = call(Rewards(judge)).extra
    assert extra == {"mine": [None, read, None, None]} and type(extra["mine"][1]) is type(read)
    assert json.loads(encoded(0, extra)) == {**extra, "step": 0}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "kind", ["bool", "int", "float", "float32", "bool of numpy", "0-d array", "0-d tensor", "fraction"]
)
def test_numbers_of_every_library_are_metrics(kind, where):
    value, read = WRITABLE[kind]
    judge = WHERE[where](judge_of("log_metric", "mine", lambda: value))
    assert call(Rewards(judge)).metrics["custom/mine"] == read


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("tool", ["log_extra", "log_metric"])
@pytest.mark.parametrize("name", ["", "\ud800", None, 1, ("a",), b"a"])
def test_a_name_that_is_no_text_is_refused(name, tool, where):
    judge = WHERE[where](judge_of(tool, name, lambda: 1))
    with pytest.raises(InputError, match=rf"'judge': {tool}\(.*the name must be text, and not empty"):
        call(Rewards(judge))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["step", "row", "prompt", "completion", "score", "advantage", "rewards/judge"])
def test_a_column_that_the_trainer_writes_itself_is_refused(name, where):
    """It would be replaced in silence."""
    judge = WHERE[where](judge_of("log_extra", name, lambda: 1))
    with pytest.raises(InputError, match=rf"'judge': log_extra\('{name}'\).*writes a column of that name itself"):
        call(Rewards(judge))


@pytest.mark.parametrize("where", WHERE)
def test_two_functions_that_log_the_same_column_are_refused(where):
    first = WHERE[where](judge_of("log_extra", "mine", lambda: 1))
    with pytest.raises(InputError, match=r"log_extra\('mine'\): '(judge|other)' has logged a column of that name too"):
        call(Rewards([first, judge_of("log_extra", "mine", lambda: 2)], names=["judge", "other"]))


@pytest.mark.parametrize(("one", "two"), [("a/b", "a_b"), ("mine", "custom/mine")])
def test_two_names_of_which_one_metric_would_come_are_refused(one, two):
    def judge(completions, log_metric):
        log_metric(one, 1)
        log_metric(two, 2)
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=rf"'judge': log_metric\('{two}'\).*so is '{one}'. Choose another name"):
        call(Rewards(judge))


@pytest.mark.parametrize("values", ["four", b"four", {"a": 1, "b": 2, "c": 3, "d": 4}, {1, 2, 3, 4}])
@pytest.mark.parametrize("where", WHERE)
def test_what_is_no_list_of_values_is_refused_though_its_length_fits(values, where):
    def judge(completions, log_extra):
        log_extra("mine", values)
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"'judge': log_extra\('mine'\) got .*Give a list with one value for each"):
        call(Rewards(WHERE[where](judge)))


def test_a_column_is_what_it_was_when_it_was_logged():
    def judge(completions, log_extra):
        values = [[1] for _ in completions]
        log_extra("mine", values)
        values[0].append(values)
        return [0.0] * len(completions)

    assert call(Rewards(judge)).extra == {"mine": [[1]] * 4}


@pytest.mark.parametrize("names", [["", "b"], ["a/b", "b"]])
def test_names_of_rewards_of_which_no_metric_could_come_are_refused(names):
    judge = judge_of("log_metric", "mine", lambda: 1)
    with pytest.raises(InputError, match="not empty and without a slash"):
        Rewards([judge, judge], names=names)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("tool", ["log_extra", "log_metric"])
@pytest.mark.parametrize("kind", ["lone surrogate", "tuple key", "circular list", "set", "nan"])
def test_in_a_run_it_is_refused_before_the_step_is_learnt_from(kind, tool, where, tmp_path):
    judge = WHERE[where](judge_of(tool, "mine", UNWRITABLE[kind]))
    trainer = tiny.trainer(tmp_path, rewards=judge)
    with pytest.raises(InputError, match=rf"'judge': {tool}\('mine'\)"):
        trainer.train()
    assert not trainer.learner.has_learnt and read_metrics(tmp_path) == []


@pytest.mark.parametrize("where", WHERE)
def test_in_a_run_the_line_holds_what_was_logged(where, tmp_path):
    def judge(completions, log_extra, log_metric):
        log_extra("halves", np.float32([0.5] * len(completions)))
        log_extra("facts", [{"kind": "a", "text": text} for text in completions])
        log_metric("mine", torch.tensor(2))
        return [0.0] * len(completions)

    tiny.trainer(tmp_path, rewards=WHERE[where](judge), total_steps=1).train()
    line = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert line["halves"] == 0.5 and line["facts"].keys() == {"kind", "text"} and line["facts"]["kind"] == "a"
    assert read_metrics(tmp_path)[0]["custom/mine"] == 2.0


def test_without_the_check_the_line_fails_when_it_is_written_or_becomes_some_text(tmp_path, monkeypatch):
    """Negative control: what the tests above refuse is what a line of JSON cannot hold."""
    lines = JsonLines(tmp_path / "completions.jsonl")
    silent = []
    for kind, value in UNWRITABLE.items():
        try:
            lines.write(0, {"mine": value()})
            silent.append(kind)
        except Exception as error:
            assert not isinstance(error, InputError)
    assert {"bytes", "set", "tensor", "object", "nan", "integer key"} < set(silent)
    assert {"lone surrogate", "tuple key", "circular list", "absurdly deep"} <= UNWRITABLE.keys() - set(silent)

    monkeypatch.setattr("rlhf.rewards.logged.checked_column", lambda function, column, values: list(values))
    trainer = tiny.trainer(tmp_path / "run", rewards=judge_of("log_extra", "mine", circular))
    with pytest.raises(ValueError, match="Circular"):
        trainer.train()
