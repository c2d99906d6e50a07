"""Reward functions that check answers, formats and lengths, with the signature described in rewards/combine.py.

Ready for use, also on a command line (`--reward rlhf.verifiers:math_equality`):

    exact_match, math_equality     1 if the final answer is the one in the column "answer", else 0
    think_format                   1 for one <think>...</think> followed by an answer, else 0

Made by a call; for a command line, write a file with a line such as `shorter = soft_overlong_punishment(512, 128)`:

    matches_format, repetition_penalty, soft_overlong_punishment, cosine_length

The final answer of a text is what follows its last "####" (the data set GSM8K), else the content of its last
\\boxed{...}, else the whole text; a <think>...</think> before it is left out. Completions are strings or message lists.
"""

import functools
import importlib
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.errors import InputError, excerpt
from rlhf.isolation.workers import Worker, WorkerDied, WorkerError, WorkerTimeout
from rlhf.rewards.functions import signature_of

CHECK_S = 5.0
"""Time limit for the check of one completion, in seconds; a completion that exceeds it scores 0."""
LOST_S = 60.0
"""Once failed checks have taken this many seconds of a call, its other checks get a tenth of `CHECK_S`."""
ANSWER_CHARACTERS = 500
"""A longer final answer scores 0 in `math_equality`."""
TEXT_CHARACTERS = 4000
"""How much of the end of a text `math_equality` reads if no final answer is marked."""
Scores = list[float | None]
Reward = Callable[..., Scores]


# --- answers ---


def text_of(completion: Any) -> str:
    """The text of a completion; for a list of messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def final_answer(text: str) -> str | None:
    """The final answer, marked by "####" or \\boxed{...}, after all thinking; None if nothing is marked."""
    text = text.rpartition("</think>")[2]
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None  # no closing brace: the text was cut


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> Scores:
    """1 if the final answer (see above) equals that of `answer` in every character; else 0."""

    def final(text: str) -> str:
        marked = final_answer(text)
        return (text.rpartition("</think>")[2] if marked is None else marked).strip()

    return [float(final(text_of(c)) == final(str(a))) for c, a in zip(completions, answer, strict=True)]


def math_equality(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> Scores:
    """1 if math-verify finds the final answer equal to that of the column "answer" (or "solution"); else 0.

    None where the column holds no mathematics. Each check may take `CHECK_S`, in a process that can be killed; one that
    takes longer or crashes scores 0. The metric custom/math_checks_failed is the share of these.
    """
    gold = solution if answer is None else answer
    if gold is None:
        raise InputError('math_equality needs the column "answer" or "solution" in the data set.')
    worker = _math_worker()
    rows = [{"gold": str(g), "text": text_of(c)} for g, c in zip(gold, completions, strict=True)]
    return _checked(worker, rows, "math_checks_failed", log_metric)


def _checked(
    worker: Worker, rows: list[dict[str, Any]], metric: str, log_metric: Callable[[str, float], None] | None
) -> Scores:
    """The worker's score for each row; 0 where it failed or ran out of time. Logs the share of these as `metric`."""
    scores: Scores = []
    failed = 0
    lost = 0.0
    for row in rows:
        started = time.monotonic()
        try:
            scores.append(worker.call(row, CHECK_S if lost <= LOST_S else CHECK_S / 10))
        except (WorkerTimeout, WorkerDied, WorkerError):
            scores.append(0.0)
            failed += 1
            lost += time.monotonic() - started
    if log_metric is not None:
        log_metric(metric, failed / max(1, len(rows)))
    return scores


@functools.cache
def _math_worker() -> Worker:
    """This process's worker. It is started with imports done and each parser used once: time limits cover only checks."""
    try:
        importlib.import_module("math_verify")
    except ImportError as error:
        raise InputError("math_equality needs math-verify: pip install rlhf-toolkit[math]") from error
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn that they set no time limit; the worker does
    for answer, text in (("$\\frac{1}{2}$", "it is 1/2"), ("x^2 + 2x", "\\boxed{x(x+2)}"), ("\\{1\\}", "$(0, 1]$")):
        _equal(answer, text)
    return Worker(_equal)


def _equal(gold: str, text: str) -> float | None:
    """Score of one completion, None if `gold` holds no mathematics. Runs in the worker."""
    import math_verify

    marked = final_answer(gold)
    expected = _parsed(gold if marked is None else marked, bare=True)
    if not expected:
        return None
    given = final_answer(text)
    if given is None:
        found = _parsed(text.rpartition("</think>")[2][-TEXT_CHARACTERS:], bare=False)
    else:
        found = _parsed(given, bare=True) if len(given) <= ANSWER_CHARACTERS else []
    return float(math_verify.verify(expected, found, timeout_seconds=None))


def _parsed(text: str, *, bare: bool) -> list[Any]:
    """The expressions found in `text`. bare: it is one expression without $...$, unless it is a sentence."""
    import math_verify

    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    sentence = "$" in text or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,} ", text)
    if bare and not sentence:
        text = f"\\boxed{{{text}}}"
    return math_verify.parse(
        text, [latex, math_verify.ExprExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )


# --- formats ---


def think_format(completions: Sequence[Any], **_: Any) -> Scores:
    """1 for `<think>` at the start, one `</think>` later and an answer after it; else 0."""

    def good(text: str) -> bool:
        thought, _, rest = text.removeprefix("<think>").partition("</think>")
        once = text.count("<think>") == text.count("</think>") == 1
        return once and text.startswith("<think>") and bool(thought.strip()) and bool(rest.strip())

    return [float(good(text_of(completion).strip())) for completion in completions]


def matches_format(pattern: str) -> Reward:
    """1 if the whole completion matches the regular expression (a dot matches any character), else 0.

    A completion on which matching takes longer than `CHECK_S` scores 0; custom/format_checks_failed is their share.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"matches_format({pattern!r}): {error}. Give a regular expression.") from error
    worker = Worker(lambda text: float(compiled.fullmatch(text) is not None))

    def matches_format(
        completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **_: Any
    ) -> Scores:
        return _checked(worker, [{"text": text_of(c)} for c in completions], "format_checks_failed", log_metric)

    return matches_format


# --- lengths ---


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Reward:
    """`max_penalty` times the share of word n-grams that repeat an earlier one; 0 for texts with fewer than n words.

    Words are separated by white space and compared in lower case.
    """
    if ngram_size < 1 or not (math.isfinite(max_penalty) and max_penalty <= 0):
        raise InputError(
            f"repetition_penalty(ngram_size={ngram_size}, max_penalty={max_penalty}): give an ngram_size of at least "
            "1 and a max_penalty of at most 0."
        )

    def penalty(text: str) -> float:
        words = text.lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    def repetition_penalty(completions: Sequence[Any], **_: Any) -> Scores:
        return [penalty(text_of(completion)) for completion in completions]

    return repetition_penalty


def soft_overlong_punishment(max_tokens: int, buffer_tokens: int) -> Reward:
    """DAPO (arXiv 2503.14476) eq. 13: 0 up to max_tokens - buffer_tokens, then linearly to -1 at max_tokens, -1 beyond."""
    if not 0 < buffer_tokens <= max_tokens:
        raise InputError(
            f"soft_overlong_punishment(max_tokens={max_tokens}, buffer_tokens={buffer_tokens}): give a "
            "buffer_tokens of at least 1 and at most max_tokens."
        )

    def soft_overlong_punishment(completion_ids: Sequence[Sequence[int]], **_: Any) -> Scores:
        over = [len(ids) - (max_tokens - buffer_tokens) for ids in completion_ids]
        return [-min(1.0, max(0.0, tokens / buffer_tokens)) for tokens in over]

    return soft_overlong_punishment


def cosine_length(
    correct: Reward,
    max_tokens: int,
    *,
    right: tuple[float, float] = (2.0, 1.0),
    wrong: tuple[float, float] = (-10.0, 0.0),
    too_long: float = -10.0,
) -> Reward:
    """The cosine reward of arXiv 2502.03373, section 4.2: brief right answers gain most, brief wrong ones lose most.

    Args:
        correct: A reward function that scores right answers above 0.5, such as `exact_match`. Where it gives None, so
            does the result.
        right, wrong: The scores of right and wrong answers at length 0 and as the length nears `max_tokens`, with half
            a cosine in between.
        too_long: The score at `max_tokens` and beyond.
    """
    if max_tokens < 1 or not all(map(math.isfinite, (*right, *wrong, too_long))):
        raise InputError(
            f"cosine_length(max_tokens={max_tokens}, right={right}, wrong={wrong}, too_long={too_long}): give a max_tokens "
            "of at least 1 and finite scores."
        )
    signature = signature_of(correct)

    def score(judged: float | None, length: int) -> float | None:
        if judged is None or length >= max_tokens:
            return None if judged is None else too_long
        first, last = right if judged > 0.5 else wrong
        return last + (first - last) * (1 + math.cos(math.pi * length / max_tokens)) / 2

    def cosine_length(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> Scores:
        keywords = {"completions": completions, "completion_ids": completion_ids, **columns}
        judged = correct(**signature.select(keywords))
        if len(judged) != len(completion_ids):
            raise InputError(
                f"cosine_length: {excerpt(correct)} gave {len(judged)} scores for {len(completion_ids)} "
                "completions. Return one score for each."
            )
        return [score(verdict, len(ids)) for verdict, ids in zip(judged, completion_ids, strict=True)]

    return cosine_length
