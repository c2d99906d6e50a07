"""Built-in rewards: what is right scores as published, and nothing that a model writes can hang, crash or fool them."""

import math
import time

import pytest

from rlhf import verifiers
from rlhf.errors import InputError
from rlhf.rewards.calls import isolated
from rlhf.rewards.combine import Rewards
from rlhf.verifiers import (
    cosine_length,
    exact_match,
    final_answer,
    matches_format,
    math_equality,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)


def metrics():
    logged = {}
    return logged, lambda name, value: logged.update({name: value})


# --- final answers ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6 * 7 = 42 #### 42", "42"),
        ("#### 1\nno, \n####  42 \nas I said", "42"),
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} or \\boxed{\\frac{1}{\\sqrt{2}}} it is", "\\frac{1}{\\sqrt{2}}"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> two", None),
        ("\\boxed{\\frac{1}{2", None),
        ("42", None),
        ("####", ""),
        ("", None),
    ],
)
def test_the_final_answer_is_what_the_last_mark_says(text, expected):
    assert final_answer(text) == expected


def test_exact_match_compares_the_final_answers_only():
    completions = ["x #### 42", " 42 ", "\\boxed{42}", "<think>41</think>42", "42.0", "4 2", [{"content": "#### 42"}]]
    assert exact_match(completions=completions, answer=["a #### 42", "42", 42, "42", "42", "42", "42"]) == [
        *[1.0] * 4,
        *[0.0] * 2,
        1.0,
    ]


# --- mathematics ---


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("thus 40 + 2 = 42\n#### 42", "Natalia sold 48/2 = 24 ... #### 42", 1.0),
        ("The final answer is $42$", "42", 1.0),
        ("\\boxed{42.0}", 42, 1.0),
        ("\\boxed{1,000}", "#### 1,000", 1.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("\\boxed{\\frac{2}{4}}", "$\\frac{1}{2}$", 1.0),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", 1.0),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1.0),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1.0),
        ("\\boxed{42}", "The answer is 42", 1.0),
        ("\\boxed{43}", "42", 0.0),
        ("\\boxed{42} no, \\boxed{43}", "42", 0.0),
        ("<think>\\boxed{42}</think> \\boxed{7}", "42", 0.0),
        ("\\boxed{x^2}", "x^2 + 1", 0.0),
        ("\\boxed{", "42", 0.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        ("\\boxed{" + "1+" * 300 + "1}", "301", 0.0),  # too long to be read as an answer
        ([{"role": "assistant", "content": "\\boxed{42}"}], "42", 1.0),
    ],
)
def test_equal_mathematics_scores_1_however_it_is_written(completion, answer, expected):
    assert math_equality([completion], answer=[answer]) == [expected]
    assert math_equality([completion], solution=[answer]) == [expected]


@pytest.mark.parametrize("gold", ["", "####", "\\frac{", "$$"])
def test_a_gold_answer_without_mathematics_is_left_out(gold):
    assert math_equality(["\\boxed{42}", "\\boxed{42}"], answer=[gold, "42"]) == [None, 1.0]


def test_a_data_set_without_answers_is_named():
    with pytest.raises(InputError, match='column "answer" or "solution"'):
        math_equality(["42"])


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(verifiers.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install rlhf-toolkit\[math\]"):
        verifiers._math_worker.__wrapped__()


def test_checks_that_do_not_end_score_0_and_are_counted(monkeypatch):
    monkeypatch.setattr(verifiers, "CHECK_S", 1.0)
    logged, log_metric = metrics()
    started = time.monotonic()
    hostile = "\\boxed{9^{9^{9^{9}}} - 9^{9^{9^{8}}}}"
    scores = math_equality(["\\boxed{1}", hostile, "\\boxed{1}"], answer=["1", "1", "1"], log_metric=log_metric)
    assert scores == [1.0, 0.0, 1.0] and time.monotonic() - started < 20
    assert logged["math_checks_failed"] in (0.0, 1 / 3)  # math-verify may refuse it by itself


def test_failed_checks_lose_no_more_than_a_bound_of_a_batch(monkeypatch):
    monkeypatch.setattr(verifiers, "CHECK_S", 10.0)
    monkeypatch.setattr(verifiers, "LOST_S", -1.0)
    worker = verifiers.Worker(lambda text: time.sleep(1000) if text == "slow" else 1.0)
    logged, log_metric = metrics()
    started = time.monotonic()
    rows = [{"text": text} for text in ("slow", "slow", "slow", "fast")]
    assert verifiers._checked(worker, rows, "failed", log_metric) == [0.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - started < 20 and logged == {"failed": 0.75}
    worker.close()


def test_it_works_as_an_isolated_reward_with_its_metric():
    rewards = Rewards(isolated(math_equality), timeout_s=60.0)
    result = rewards(
        prompts=["p"] * 2, completions=["\\boxed{1}", "2"], completion_ids=[[1]] * 2, columns={"answer": ["1", "3"]}
    )
    assert rewards.names == ["math_equality"] and result.scores == [1.0, 0.0]
    assert result.metrics["custom/math_checks_failed"] == 0.0


# --- formats ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>why</think>so", 1.0),
        ("<think>\nwhy\n</think>\n\nso\nand so", 1.0),
        ("why</think>so", 0.0),
        ("<think>why", 0.0),
        ("<think></think>so", 0.0),
        ("<think>why</think>", 0.0),
        ("well <think>why</think>so", 0.0),
        ("<think>why</think>so</think>", 0.0),
        ("<think><think>why</think>so", 0.0),
    ],
)
def test_think_format(text, expected):
    assert think_format(completions=[text, [{"role": "assistant", "content": text}]]) == [expected] * 2


def test_a_pattern_must_match_all_of_the_completion():
    reward = matches_format("<a>.*</a>")
    assert reward(completions=["<a>x\ny</a>", "<a>x</a> ", "x"]) == [1.0, 0.0, 0.0]
    assert reward.__name__ == "matches_format"


def test_a_pattern_that_blows_up_scores_0_and_is_counted(monkeypatch):
    monkeypatch.setattr(verifiers, "CHECK_S", 0.5)
    logged, log_metric = metrics()
    reward = matches_format("(a+)+")
    assert reward(completions=["aa", "a" * 60 + "b", "a"], log_metric=log_metric) == [1.0, 0.0, 1.0]
    assert logged == {"format_checks_failed": 1 / 3}


# --- lengths ---


def test_repeated_ngrams_cost_their_share():
    reward = repetition_penalty(ngram_size=2, max_penalty=-0.5)
    # "a b a b a": 4 pairs of which 2 differ
    assert reward(completions=["a B A b a", "a b c", "a", "", "x x x x x"]) == [-0.25, 0.0, 0.0, 0.0, -0.375]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (20, -1.0), (21, -1.0), (500, -1.0)]
)
def test_soft_overlong_punishment_is_equation_13_of_dapo(length, expected):
    assert soft_overlong_punishment(20, 8)(completion_ids=[[0] * length]) == [expected]


def test_cosine_length_is_a_half_cosine_between_the_named_scores():
    def judge(completions, answer):
        return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]

    reward = cosine_length(judge, 12, right=(2.0, 1.0), wrong=(-10.0, 0.0), too_long=-7.0)
    completions = ["1"] * 7
    answer = ["1", "1", "1", "2", "2", "2", None]
    lengths = [0, 6, 4, 0, 4, 12, 12]  # cos(pi / 3) = 1 / 2
    found = reward(completions=completions, completion_ids=[[0] * n for n in lengths], answer=answer, prompts=None)
    assert found[:6] == pytest.approx([2.0, 1.5, 1.75, -10.0, -7.5, -7.0], abs=1e-12) and found[6] is None
    assert reward(completions=["1"], completion_ids=[[0] * 11], answer=["1"])[0] == pytest.approx(
        1.5 + 0.5 * math.cos(math.pi * 11 / 12), abs=1e-12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: soft_overlong_punishment(10, 0),
        lambda: soft_overlong_punishment(10, 11),
        lambda: repetition_penalty(0),
        lambda: repetition_penalty(3, 1.0),
        lambda: cosine_length(exact_match, 0),
        lambda: cosine_length(exact_match, 10, right=(math.nan, 1.0)),
        lambda: matches_format("("),
    ],
)
def test_bad_settings_are_named_when_the_reward_is_made(make):
    with pytest.raises(InputError, match=r"[Gg]ive"):
        make()


def test_every_reward_has_a_name_for_the_log():
    made = [repetition_penalty(), soft_overlong_punishment(8, 4), cosine_length(exact_match, 8), matches_format("a")]
    assert Rewards([math_equality, exact_match, think_format, *made]).names == [
        "math_equality",
        "exact_match",
        "think_format",
        "repetition_penalty",
        "soft_overlong_punishment",
        "cosine_length",
        "matches_format",
    ]
