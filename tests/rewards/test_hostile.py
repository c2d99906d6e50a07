"""Whatever a reward function does, the step ends in time with a message that names it, and the next step can be scored.

Each misdeed happens on the row that asks for it, of a batch of four, through `Rewards`, in this process and isolated.
"""

import asyncio
import ctypes
import inspect
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rlhf.errors import InputError
from rlhf.rewards import calls as reward_calls
from rlhf.rewards.calls import isolated
from rlhf.rewards.combine import Rewards

LATEST = 20.0
"""Seconds by which everything must have ended; only prevents a hang."""


def misdeed(completions, **columns):
    """Scores 1 for each row, unless one asks for something else. In another process only: what ends a process."""
    return [do(text) for text in completions]


def do(text):
    if text == "raise":
        raise KeyError("the key")
    if text == "loop":
        while True:
            pass
    if text == "swallow":  # everything that Exception covers
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue
    if text == "sleep":
        time.sleep(1000)
    if text == "regex":
        re.fullmatch("(a+)+", "a" * 60 + "b")
    if text == "power":
        return 9 ** (9**9)
    if text == "uninterrupted":  # C code that looks at no signal and lets no thread run
        any(itertools.repeat(0))
    if text == "sys.exit":
        sys.exit(3)
    if text == "os._exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "fork":  # the fork holds everything that the worker holds
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(3)
    if text == "print":
        print("x" * 100_000_000)
    if text == "long":
        return "x" * 100_000_000
    return 1.0


@pytest.fixture(scope="module", params=["here", "isolated"])
def rewards(request):
    return Rewards(misdeed if request.param == "here" else isolated(misdeed), timeout_s=0.7)


@pytest.fixture(scope="module")
def apart():
    return Rewards(isolated(misdeed), timeout_s=3.0)


def call(rewards, *completions, **options):
    completions = list(completions) or ["good"] * 4
    rows = len(completions)
    prompts = [f"prompt {row}" for row in range(rows)]
    return rewards(prompts=prompts, completions=completions, completion_ids=[[1]] * rows, **options)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine a new worker alone may take a second to start."""
    monkeypatch.setattr(reward_calls, "ROW_S", 2.5)
    monkeypatch.setattr(reward_calls, "SEARCH_S", 15.0)


def refused(rewards, *completions):
    """The message of the error that it must end in; afterwards it serves again."""
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        call(rewards, *completions)
    assert time.monotonic() - started < LATEST
    assert call(rewards).scores == [1.0] * 4
    return str(error.value)


def all_in(parts, message):
    missing = [part for part in parts if part not in message]
    assert not missing and len(message) < 1000, message
    return True


LATE = ["'misdeed'", "reward_timeout_s=0.7", "Row 3 alone", "'prompt 3'", "raise reward_timeout_s"]


@pytest.mark.parametrize("kind", ["loop", "swallow", "sleep", "regex", "power"])
def test_a_function_that_does_not_return_is_named_with_its_row(rewards, kind):
    assert all_in([*LATE, f"{kind!r}"], refused(rewards, "good", "good", "good", kind))


def test_c_code_that_does_not_return_is_named_with_its_row_if_isolated():
    rewards = Rewards(isolated(misdeed), timeout_s=0.7)
    assert all_in([*LATE, "'uninterrupted'"], refused(rewards, "good", "good", "good", "uninterrupted"))


@pytest.mark.parametrize(
    ("kind", "parts"), [("raise", ["raised KeyError: 'the key'"]), ("sys.exit", ["raised SystemExit: 3"])]
)
def test_a_function_that_raises_is_named_with_line_and_row(rewards, kind, parts):
    line = next(
        number
        for number, text in enumerate(inspect.getsource(do).splitlines(), do.__code__.co_firstlineno)
        if text.strip() in ('raise KeyError("the key")', "sys.exit(3)") and (kind == "raise") == ("raise" in text)
    )
    parts = ["'misdeed'", *parts, f"test_hostile.py:{line}", "on row 3", "'prompt 3'", "Repair"]
    assert all_in(parts, refused(rewards, "good", "good", "good", kind))


@pytest.mark.parametrize(
    ("kind", "how"), [("os._exit", "exit code 3"), ("segfault", "killed by SIGSEGV"), ("fork", "exit code 3")]
)
def test_a_function_that_ends_its_process_is_named_with_its_row(apart, kind, how):
    parts = ["'misdeed'", "ended its process", how, "on row 3", "'prompt 3'"]
    assert all_in(parts, refused(apart, "good", "good", "good", kind))


def test_output_without_end_is_cut_and_costs_nothing_else(apart, capsys):
    assert call(apart, "good", "print", "good").scores == [1.0] * 3
    assert len(capsys.readouterr().out) < 70_000


def test_an_answer_of_100_mb_is_refused_before_it_is_sent(apart):
    assert all_in(["'misdeed'", "100000", "bytes", "on row 1"], refused(apart, "good", "long"))


def returns(completions, answer):
    return ANSWERS[answer[0]] if answer[0] in ANSWERS else [1.0] * len(completions)


WHOLE = ["'returns'", "Return a list", "4 completions"]
ROW = ["'returns'", "row 2", "'prompt 2'", "finite number", "None"]
CASES = {
    "nothing": (None, ["NoneType", *WHOLE]),
    "number": (1.0, ["float 1.0", *WHOLE]),
    "text": ("1234", ["str '1234'", *WHOLE]),
    "dict": ({"a": 1, "b": 2}, ["dict {'a': 1, 'b': 2}", *WHOLE]),
    "set": ({1.0}, ["set {1.0}", *WHOLE]),
    "generator": (iter([1.0] * 4), ["list_iterator", *WHOLE]),
    "short": ([1.0] * 3, ["3 scores for 4", *WHOLE]),
    "empty": ([], ["0 scores for 4", *WHOLE]),
    "matrix": (torch.ones(4, 1), ["shape (4, 1)", *WHOLE]),
    "array": (np.ones((4, 2)), ["shape (4, 2)", *WHOLE]),
    "nan": ([1.0, 2.0, math.nan, 4.0], ["nan", *ROW]),
    "inf": ([1.0, 2.0, -math.inf, 4.0], ["-inf", *ROW]),
    "huge": ([1.0, 2.0, -3e38, 4.0], ["-3e+38", *ROW]),
    "long int": ([1.0, 2.0, 10**400, 4.0], ["10000", *ROW]),
    "a number as text": ([1.0, 2.0, "3", 4.0], ["'3'", *ROW]),
    "a list in it": ([1.0, 2.0, [3.0], 4.0], ["[3.0]", *ROW]),
    "complex": ([1.0, 2.0, 3 + 0j, 4.0], ["(3+0j)", *ROW]),
    "tensor in it": ([1.0, 2.0, torch.ones(1, 1), 4.0], [*ROW]),
    "nan in a tensor": (torch.tensor([1.0, 2.0, math.nan, 4.0]), ["nan", *ROW]),
}
ANSWERS = {name: answer for name, (answer, _) in CASES.items()}


@pytest.fixture(scope="module", params=["here", "isolated"])
def returning(request):
    return Rewards(returns if request.param == "here" else isolated(returns), timeout_s=LATEST)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_answer_is_named_alike_in_both_processes(returning, case):
    with pytest.raises(InputError) as error:
        call(returning, columns={"answer": [case] * 4})
    assert all_in(CASES[case][1], str(error.value))
    assert call(returning, columns={"answer": ["good"] * 4}).scores == [1.0] * 4


# --- what isolation keeps ---


def logs(completions, trainer_state, log_extra, log_metric):
    log_extra("length", np.array([len(text) for text in completions]))
    log_metric("step", trainer_state.global_step)
    log_metric("step", trainer_state["global_step"] + 2)
    return torch.tensor([float(len(text)) for text in completions])


@pytest.mark.parametrize("wrap", [lambda f: f, isolated])
def test_logs_and_trainer_state_work_in_both_processes(wrap):
    rewards = Rewards(wrap(logs))
    result = call(rewards, "a", "bb", trainer_state={"global_step": 5})
    assert rewards.names == ["logs"] and result.scores == [1.0, 2.0] and result.extra == {"length": [1, 2]}
    assert result.totals["custom/step"] == (12, 2)


def test_an_isolated_function_keeps_name_signature_and_state():
    seen = []

    def remembers(completions, bonus=1.0):
        """Counts its calls."""
        seen.append(1)
        return [len(seen) + bonus for _ in completions]

    function = isolated(remembers)
    assert (function.__name__, function.__doc__) == ("remembers", "Counts its calls.")
    assert str(inspect.signature(function)) == "(completions, bonus=1.0)"
    rewards = Rewards([function, remembers])
    assert [call(rewards, "a").per_function["remembers"] for _ in range(3)] == [[2.0], [3.0], [4.0]]
    assert function(completions=["a"]) == [5.0] and len(seen) == 3  # only what this process called


def test_bad_logging_is_named_from_both_processes():
    def logs_short(completions, log_extra):
        log_extra("lengths", [1])
        return [0.0] * len(completions)

    for function in (logs_short, isolated(logs_short)):
        with pytest.raises(InputError, match=r"log_extra\('lengths'\) got 1 values. Give one for each of 4"):
            call(Rewards(function))


def test_isolated_functions_run_at_the_same_time(tmp_path):
    def meets(me, other):
        def waits(completions):
            (tmp_path / me).touch()
            while not (tmp_path / other).exists():
                time.sleep(0.01)
            return [1.0] * len(completions)

        return waits

    functions = [isolated(meets("a", "b")), isolated(meets("b", "c")), meets("c", "a")]
    assert call(Rewards(functions, timeout_s=LATEST)).scores == [3.0] * 4


def test_a_failure_ends_the_calls_that_still_run():
    def sleeps(completions):
        time.sleep(1000)

    started = time.monotonic()
    with pytest.raises(InputError, match="'misdeed' raised KeyError"):
        call(Rewards([isolated(sleeps), misdeed]), "raise")
    assert time.monotonic() - started < LATEST


# --- async ---


async def judge(completions):
    if "block" in completions:  # the loop too
        time.sleep(3)
    if "wait" in completions:
        await asyncio.sleep(1000)
    if "own timeout" in completions:
        raise TimeoutError("of the client")
    if "sys.exit" in completions:
        sys.exit(3)
    return [1.0] * len(completions)


@pytest.mark.parametrize("wrap", [lambda f: f, isolated])
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("block", ["did not return within", "Row 3"]),
        ("wait", ["did not return within", "Row 3"]),
        ("own timeout", ["raised TimeoutError: of the client", "row 3"]),
        ("sys.exit", ["raised SystemExit: 3", "row 3"]),
    ],
)
def test_an_async_function_that_fails_is_named_with_its_row(wrap, kind, parts):
    assert all_in(["'judge'", *parts], refused(Rewards(wrap(judge), timeout_s=0.5), "good", "good", "good", kind))


# --- in this process ---


def test_the_users_own_alarm_and_handler_survive():
    rang = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rang.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        assert call(Rewards(misdeed, timeout_s=5.0)).scores == [1.0] * 4
        assert rang.wait(LATEST)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_is_not_taken_for_a_failure_of_the_function():
    def interrupted(completions):
        signal.raise_signal(signal.SIGINT)
        return [1.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        call(Rewards(interrupted, timeout_s=LATEST))


STUCK = """
import itertools
import rlhf.rewards.calls
from rlhf.rewards.combine import Rewards
rlhf.rewards.calls.GRACE_S = 0.5
def stuck(completions): return [any(itertools.repeat(0))]
Rewards(stuck, timeout_s=0.5)(prompts=["p"], completions=["c"], completion_ids=[[1]])
"""


def test_c_code_that_does_not_return_ends_the_process_with_a_traceback():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in stuck" in done.stderr


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_deadline_is_a_positive_number(value):
    with pytest.raises(InputError, match=r"reward_timeout_s=.*above 0, or null"):
        Rewards(misdeed, timeout_s=value)


# --- what it measures ---


def test_the_deviation_of_each_function_is_that_of_its_scores():
    values = [1.0, None, 4.0, -2.5]
    result = call(Rewards([lambda completions: values, lambda completions: [0.1] * 4], names=["a", "b"]))
    assert result.totals["rewards/a/std"] == (1.0 + 16.0 + 6.25, 3.0)  # adds up over processes
    assert result.metrics["rewards/a/std"] == pytest.approx(np.std([1.0, 4.0, -2.5]), abs=1e-12)
    assert result.metrics["rewards/b/std"] == 0.0  # exactly, though 0.1 has no exact square
