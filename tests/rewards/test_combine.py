"""Rewards: the signature users have, several functions, every bad answer named, async, and functions by name."""

import asyncio
import copy
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch

from rlhf.errors import InputError
from rlhf.rewards.combine import Rewards
from rlhf.rewards.functions import load_reward_function
from tests.rewards.batch import COMPLETIONS, PROMPTS, by_length, call


def returns(answer):
    def scorer(completions, **columns):
        return answer

    return scorer


# --- what a function is given ---


def test_a_function_gets_the_keywords_users_know():
    seen = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_extra"]("length", [len(c) for c in completions])
        kwargs["log_metric"]("longest", 5)
        kwargs["log_metric"]("longest", 7)
        return [float(answer) for answer in kwargs["answer"]]

    result = call(Rewards(reward), columns={"answer": [1, 2, 3, 4]}, trainer_state="state", prompt_ids=[[0]] * 4)
    assert set(seen) == {
        "prompts",
        "completions",
        "completion_ids",
        "answer",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
    assert (seen["prompts"], seen["completions"], seen["answer"]) == (PROMPTS, COMPLETIONS, [1, 2, 3, 4])
    assert seen["trainer_state"] == "state"
    assert result.scores == [1, 2, 3, 4] and result.extra == {"length": [1, 3, 5, 1]}
    assert result.metrics["custom/longest"] == 6 and result.totals["custom/longest"] == (12, 2)


class Judge:
    def __call__(self, completions, answer):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("function", "expected", "name"),
    [
        (by_length, [1, 3, 5, 1], "by_length"),
        (functools.partial(by_length, bonus=1.0), [2, 4, 6, 2], "by_length"),
        (Judge(), [1, 0, 0, 1], "Judge"),
        (lambda prompt_ids: [len(p) for p in prompt_ids], [2, 2, 2, 2], "<lambda>"),
    ],
)
def test_a_function_without_kwargs_gets_only_what_it_names(function, expected, name):
    result = call(Rewards(function), columns={"answer": ["a", "x", "x", "d"]}, prompt_ids=[[0, 0]] * 4)
    assert result.scores == expected and list(result.per_function) == [name]


@pytest.mark.parametrize(
    ("function", "columns", "parts"),
    [
        (Judge(), ["anwser"], ["'Judge'", "'answer'", "columns anwser", "Did you mean 'anwser'"]),
        (lambda texts: [], [], ["'texts'", "none", "Rename the parameter"]),
        (by_length, ["completions"], ["'completions'", "Rename it"]),
    ],
)
def test_a_function_that_cannot_be_called_is_known_before_anything_is_generated(function, columns, parts):
    with pytest.raises(InputError) as error:
        Rewards(function).check_columns(columns)
    for part in parts:
        assert part in str(error.value)


def test_a_positional_only_parameter_is_refused():
    def reward(completions, /):
        return [0.0]

    with pytest.raises(InputError, match=r"'reward'.*'completions'.*Remove the /"):
        Rewards(reward)


# --- several functions ---


def test_weights_and_abstentions():
    first, second = returns([1.0, None, 3.0, None]), returns([10.0, 20.0, None, 40.0])
    result = call(Rewards([first, second], weights=[2.0, 0.5], names=["first", "second"]))
    assert result.scores == [7.0, 10.0, 6.0, 20.0]
    assert result.per_function == {"first": [1.0, None, 3.0, None], "second": [10.0, 20.0, None, 40.0]}
    assert result.totals["rewards/first/mean"] == (4.0, 2.0) and result.metrics["rewards/first/mean"] == 2.0
    assert result.metrics["rewards/first/abstained"] == 0.5 and result.metrics["rewards/unscored"] == 0.0


def test_equal_names_are_numbered():
    assert Rewards([by_length, by_length, Judge(), by_length]).names == [
        "by_length",
        "by_length_2",
        "Judge",
        "by_length_3",
    ]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"functions": []}, ["at least one"]),
        ({"functions": [by_length, "text"]}, ["'text'", "cannot be called"]),
        ({"functions": [by_length], "weights": [1.0, 2.0]}, ["reward_weights=[1.0, 2.0]", "each of 1"]),
        ({"functions": [by_length], "weights": [math.nan]}, ["reward_weights=[nan]", "finite"]),
        ({"functions": [by_length, Judge()], "names": ["x", "x"]}, ["['x', 'x']", "2 different names"]),
    ],
)
def test_bad_settings_name_themselves(options, parts):
    functions = options.pop("functions")
    with pytest.raises(InputError) as error:
        Rewards(functions, **options)
    for part in parts:
        assert part in str(error.value)


def test_a_row_without_any_score_is_an_error_or_counted():
    rewards = Rewards([returns([1.0, None, 3.0, None]), returns([None, None, 3.0, 1.0])])
    with pytest.raises(InputError, match=r"1 of 4 completions have no score.*row 1 \(prompt 'the second'\).*number"):
        call(rewards)
    result = call(rewards, allow_unscored=True)
    assert result.scores[1] is None and result.scores[0] == 1.0
    assert result.totals["rewards/unscored"] == (1, 4)
    nothing = call(
        Rewards(returns([None] * 4)), allow_unscored=True
    )  # the trainer looks at all processes' rows together
    assert nothing.scores == [None] * 4 and nothing.totals["rewards/unscored"] == (4, 4)


# --- what a function returns ---


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.0, True, False],
        (1, 2.0, 1, 0),
        np.array([1, 2, 1, 0]),
        np.array([1, 2, 1, 0], dtype=np.float16),
        torch.tensor([1, 2, 1, 0]),
        torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1), np.int64(2), np.bool_(True), np.float64(0)],
        [torch.tensor(1), torch.tensor(2.0), np.array(1), torch.tensor(False)],
    ],
)
def test_every_usual_kind_of_number_is_a_score(answer):
    scores = call(Rewards(returns(answer))).scores
    assert scores == [1.0, 2.0, 1.0, 0.0] and all(type(score) is float for score in scores)


WHOLE = ["'scorer'", "Return a list", "4 completions"]
ROW = ["'scorer'", "row 2", "'the third'", "finite number", "None"]


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (None, ["NoneType", *WHOLE]),
        (1.0, ["float 1.0", *WHOLE]),
        ("1234", ["str '1234'", *WHOLE]),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, ["dict", *WHOLE]),
        ({1.0, 2.0, 3.0, 4.0}, ["set", *WHOLE]),
        ((x for x in [1.0] * 4), ["generator", *WHOLE]),
        ([1.0] * 3, ["3 scores for 4", *WHOLE]),
        ([], ["0 scores for 4", *WHOLE]),
        (torch.ones(4, 1), ["shape (4, 1)", *WHOLE]),
        (np.ones((4, 2)), ["shape (4, 2)", *WHOLE]),
        (torch.tensor(1.0), ["shape ()", *WHOLE]),
        (torch.ones(3), ["3 scores for 4", *WHOLE]),
        ([1.0, 2.0, math.nan, 4.0], ["nan", *ROW]),
        ([1.0, 2.0, math.inf, 4.0], ["inf", *ROW]),
        ([1.0, 2.0, -3e38, 4.0], ["-3e+38", *ROW]),
        ([1.0, 2.0, 10**400, 4.0], ["10000", *ROW]),
        ([1.0, 2.0, "3", 4.0], ["'3'", *ROW]),
        ([1.0, 2.0, [3.0], 4.0], ["[3.0]", *ROW]),
        ([1.0, 2.0, 3 + 0j, 4.0], ["(3+0j)", *ROW]),
        ([1.0, 2.0, torch.ones(1), 4.0], ["tensor([1.])", *ROW]),
        (torch.tensor([1.0, 2.0, math.nan, 4.0]), ["nan", *ROW]),
        (np.array(["1", "2", "3", "4"]), ["'1'", "row 0"]),
    ],
)
def test_a_bad_answer_names_function_value_and_remedy(answer, parts):
    with pytest.raises(InputError) as error:
        call(Rewards(returns(answer)))
    for part in parts:
        assert part in str(error.value)


def fails_on_c(completions, **columns):
    return [1 / text.count("c") if "c" in text else {}["missing"] if text == "d" else 0.0 for text in completions]


def test_a_function_that_raises_is_named_with_row_line_and_cause():
    with pytest.raises(InputError) as error:
        call(Rewards([by_length, fails_on_c]))
    line = fails_on_c.__code__.co_firstlineno + 1
    for part in ("'fails_on_c' raised KeyError", f"test_combine.py:{line}", "row 3", "'the fourth'", "'d'", "Repair"):
        assert part in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_function_that_raises_only_on_the_whole_batch_says_so():
    def picky(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(InputError, match=r"'picky' raised RuntimeError: too many.*only on the whole batch.*the first"):
        call(Rewards(picky))


@pytest.mark.parametrize("tool", ["log_extra", "log_metric"])
def test_bad_logging_is_named(tool):
    def logs(completions, log_extra, log_metric):
        log_extra("lengths", [1]) if tool == "log_extra" else log_metric("lengths", math.nan)
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=rf"{tool}\('lengths'\).*Give"):
        call(Rewards(logs))


# --- async ---


def test_async_functions_run_at_the_same_time_as_each_other_and_as_sync_ones():
    running, all_seen = 0, threading.Event()

    async def slow(completions, **columns):
        nonlocal running
        running += 1
        for _ in range(1500):  # waits for the sync function, which waits for all three
            await asyncio.sleep(0.001)
            if all_seen.is_set():
                return [1.0] * len(completions)
        return [0.0] * len(completions)

    class Slow:
        async def __call__(self, completions):
            return await slow(completions)

    def sync(completions):
        for _ in range(1500):
            time.sleep(0.001)
            if running == 3:
                all_seen.set()
                return [1.0] * len(completions)
        return [0.0] * len(completions)

    assert call(Rewards([sync, slow, Slow(), functools.partial(slow)])).scores == [4.0] * 4


def test_async_functions_work_inside_a_running_loop_and_keep_their_loop():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    rewards = Rewards(reward)

    async def notebook():
        return call(rewards).scores

    assert asyncio.run(notebook()) == [1.0] * 4
    call(rewards)
    assert loops[0] is loops[1] and not loops[0].is_closed()  # a client opened in step 1 works in step 2


def test_an_async_function_that_raises_is_named_with_its_row():
    async def judge(completions):
        await asyncio.sleep(0)
        return [1.0 if "c" not in text else 1 / 0 for text in completions]

    with pytest.raises(
        InputError, match=r"'judge' raised ZeroDivisionError.*test_combine.py:\d+\).*row 2, .*the third"
    ):
        call(Rewards([judge, by_length]))


# --- by name ---


def write(path, text):
    path.write_text(text)
    return path


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path):
    path = write(
        tmp_path / "mine.py", "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(): return 1\n"
    )
    assert load_reward_function(f"{path}:f")() == 1
    assert load_reward_function("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("FILE", ["write file.py:function"]),
        ("FILE:", ["write file.py:function"]),
        ("absent.py:f", ["no file", "absent.py", "Check the path"]),
        ("FILE:lenght", ["no function 'lenght'", "Did you mean 'length'"]),
        ("FILE:zzz", ["no function 'zzz'", "It has length"]),
        ("FILE:LIMIT", ["LIMIT is int, not a function", "length"]),
        ("BROKEN:f", ["raised ZeroDivisionError", "Repair the file"]),
        ("SYNTAX:f", ["raised SyntaxError", "Repair the file"]),
        ("no.such.module:f", ["importing no.such.module raised ModuleNotFoundError", "file.py:function"]),
    ],
)
def test_a_bad_name_says_what_is_wrong_and_what_to_write(tmp_path, name, parts):
    for label, text in {
        "FILE": "LIMIT = 3\ndef length(completions): return []\n",
        "BROKEN": "1 / 0\n",
        "SYNTAX": "def f(:\n",
    }.items():
        name = name.replace(label, str(write(tmp_path / f"{label.lower()}.py", text)))
    with pytest.raises(InputError) as error:
        load_reward_function(name, setting="reward_functions")
    for part in [f"reward_functions={name!r}", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("weights", [[1e308, 1.0], [1e308, -1e308], [1e9, 0.0]])
def test_weights_that_make_a_score_no_number_or_beyond_all_limits_are_named_with_the_row(weights):
    """Infinity, infinity minus infinity, and a finite number that leaves no digits in float32."""
    with pytest.raises(InputError) as error:
        call(Rewards([by_length, by_length], weights=weights))
    for part in (f"reward_weights={weights}", "row 0" if weights[1] == 1.0 else "row 1", "1e+09"):
        assert part in str(error.value), str(error.value)


def test_no_score_and_a_score_of_zero_are_told_apart():
    result = call(Rewards(returns([None, 0.0, None, 1.0])), allow_unscored=True)
    assert result.scores == [None, 0.0, None, 1.0]


# --- what a function changes, nobody else sees ---


class Vandal:
    """Changes everything it is handed, in place, and says what it was handed."""

    def __init__(self, name: str) -> None:
        self.__name__, self.seen = name, []

    def __call__(self, prompts, completions, completion_ids, prompt_ids=None, answer=None, trainer_state=None):
        handed = {"prompts": prompts, "completions": completions, "ids": completion_ids, "prompt_ids": prompt_ids}
        self.seen.append(copy.deepcopy(handed | {"answer": answer, "state": dict(trainer_state)}))
        for ids in [*completion_ids, *prompt_ids]:
            ids[:] = [3] * len(ids)
        for conversation in [*prompts, *completions]:
            conversation[0]["content"] = "changed"
            conversation.append({"role": "user", "content": "more"})
        answer[0]["right"].append("me")
        trainer_state["global_step"] = 99
        for values in (prompts, completions, completion_ids, prompt_ids, answer):
            values.reverse()
        return [1.0] * len(completions)


def test_what_a_reward_function_changes_neither_the_next_one_nor_the_run_sees():
    given = {
        "prompts": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
        "completions": [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]],
        "completion_ids": [[5, 6], [7]],
        "prompt_ids": [[3, 4], [8]],
        "columns": {"answer": [{"right": ["x"]}, {"right": ["z"]}]},
        "trainer_state": {"global_step": 2},
    }
    before = copy.deepcopy(given)
    first, second = Vandal("first"), Vandal("second")
    rewards = Rewards([first, second])
    for _ in range(2):
        rewards(**given)
    assert given == before
    assert first.seen[0] == first.seen[1] == second.seen[0] == second.seen[1]
