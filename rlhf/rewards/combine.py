"""Scores completions with one or several weighted reward functions, and checks every answer.

A reward function is called with keywords and returns one number, or None for "not applicable", per completion:

    def shorter(completions, **columns):                      # sync or async, or a callable object
        return [-len(text) / 100 for text in completions]

Keywords: `prompts`, `completions`, `completion_ids`, every other column of the data set (one value per completion),
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)` (see logged.py). A function without
`**kwargs` gets only those it names. `completions` are strings, or `[{"role": "assistant", "content": text}]` if prompts
are conversations.

A function passed in Python runs in this process; one named on a command line, or wrapped by `isolated`, runs in a
worker process of its own.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rlhf.data.tokenization import Text
from rlhf.errors import InputError, excerpt
from rlhf.lifeline import phase
from rlhf.rewards.calls import EventLoop, Failure, RewardCall
from rlhf.rewards.functions import SCORE_LIMIT, check_scores, name_of
from rlhf.rewards.logged import Log

_STD = re.compile("rewards/[^/]+/std")
STANDARD = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The scores of one batch of completions."""

    scores: list[float | None]
    """Weighted sum over the functions that did not abstain; None where all did (only with `allow_unscored`)."""
    per_function: dict[str, list[float | None]]
    totals: dict[str, tuple[float, float]]
    """Metric -> (sum, count). Add both over processes, then divide: the mean is the same for any number of processes.

    "rewards/<function>/std" holds the sum of squares: see `deviations`."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns from `log_extra`, written with the completions."""

    @property
    def metrics(self) -> dict[str, float]:
        """This batch's mean or standard deviation for each of `totals`; names with a count of 0 are left out."""
        return deviations({name: total / count for name, (total, count) in self.totals.items() if count})


class Rewards:
    """One or several reward functions as one: `Rewards([length, RewardModel.load(path)], weights=[0.1, 1.0])`.

    timeout_s: time limit of one call of one function on one batch, see calls.py; None for no limit.
    """

    def __init__(
        self,
        functions: Callable[..., Any] | Sequence[Callable[..., Any]],
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        self.names = _unique(map(name_of, self.functions)) if names is None else list(names)
        if not self.functions:
            raise InputError("rewards: there is no reward. Give at least one reward function or reward model.")
        for function in self.functions:
            if not callable(function):
                raise InputError(f"rewards: {excerpt(function)} cannot be called. Give a function or a RewardModel.")
        if len(self.weights) != len(self.functions) or not all(map(math.isfinite, self.weights)):
            raise InputError(
                f"reward_weights={self.weights}: give one finite number for each of {len(self.names)} rewards."
            )
        if len(set(self.names)) != len(self.functions) or not all(name and "/" not in name for name in self.names):
            raise InputError(
                f"reward names={self.names}: give {len(self.functions)} different names, not empty and without a slash."
            )
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise InputError(f"reward_timeout_s={timeout_s}: give a number of seconds above 0, or null for no limit.")
        self.timeout_s = timeout_s
        loop = EventLoop()
        self._calls = [RewardCall(f, name, loop) for f, name in zip(self.functions, self.names, strict=True)]

    def check_columns(self, columns: Iterable[str]) -> None:
        """InputError, before anything is generated, if a function needs a column that the data set does not have."""
        columns = list(columns)
        for reserved in (*STANDARD, "prompt_ids"):
            if reserved in columns:
                raise InputError(
                    f"The data set has a column {reserved!r}, but the trainer passes this keyword to reward functions. "
                    "Rename it."
                )
        for call in self._calls:
            missing = [p for p in call.signature.required if p not in (*columns, *STANDARD, "prompt_ids")]
            if missing:
                close = get_close_matches(missing[0], [*columns, *STANDARD], n=1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise InputError(
                    f"Reward function {call.name!r} needs {', '.join(map(repr, missing))}, but the data set has the "
                    f"columns {', '.join(columns) or 'none'} besides the prompt. {hint}Rename the parameter or the column, "
                    "or give the parameter a default."
                )

    @phase("rewards")
    def __call__(
        self,
        *,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
        allow_unscored: bool = False,
    ) -> RewardResult:
        """Scores one batch.

        Each function gets copies, so no other sees its changes. Async and isolated functions run while others compute.

        Args:
            prompts: one per completion, like all other sequences.
            columns: the other columns of the data set.
            prompt_ids: needed by a `RewardModel` that reads the policy's ids.
            trainer_state: passed on to the functions; a mapping becomes a `TrainerState`.
            allow_unscored: a row on which every function abstains gets the score None instead of raising InputError.

        Raises:
            InputError: a function fails or returns a bad answer; names function, row (of this batch, from 0) and value.
        """
        log = Log(len(completions))
        if isinstance(trainer_state, Mapping):
            trainer_state = TrainerState(trainer_state)
        self.check_columns(columns or {})
        inputs = {name: list(values) for name, values in (columns or {}).items()}
        inputs |= {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
        if prompt_ids is not None:
            inputs["prompt_ids"] = list(prompt_ids)
        answers = self._call_all(inputs, {"trainer_state": trainer_state}, log)
        per_function = {
            name: check_scores(answer, len(completions), name, prompts)
            for name, answer in zip(self.names, answers, strict=True)
        }
        scores = [self._weighted(i, row) for i, row in enumerate(zip(*per_function.values(), strict=True))]
        unscored = [i for i, score in enumerate(scores) if score is None]
        if unscored and not allow_unscored:
            raise InputError(
                f"{len(unscored)} of {len(scores)} completions have no score: every reward function returned None for "
                f"row {unscored[0]} (prompt {excerpt(prompts[unscored[0]])}). Let one of them return a number."
            )
        return RewardResult(
            scores=scores,
            per_function=per_function,
            totals=_totals(per_function) | log.metrics | {"rewards/unscored": (len(unscored), len(scores))},
            extra=log.columns,
        )

    def _weighted(self, row: int, scores: Sequence[float | None]) -> float | None:
        said = [weight * score for weight, score in zip(self.weights, scores, strict=True) if score is not None]
        total = sum(said)
        if not abs(total) <= SCORE_LIMIT:
            raise InputError(
                f"reward_weights={self.weights}: the weighted sum of row {row}'s scores {list(scores)} is {total}. "
                f"Give weights with which it is at most {SCORE_LIMIT:g} in size."
            )
        return total if said else None

    def _call_all(self, inputs: Mapping[str, Sequence[Any]], tools: dict[str, Any], log: Log) -> list[Any]:
        """Each function's raw answer, in order. Isolated and async ones start first: they run while others compute."""
        waiting: list[tuple[int, Callable[[], Any], Callable[[], Any]]] = []
        answers: list[Any] = [None] * len(self._calls)
        at = 0
        try:
            for at in sorted(range(len(self._calls)), key=lambda i: self._calls[i].order):
                call = self._calls[at]
                waiting.append((at, *call.start({**inputs, **tools, **log.tools(call.name)}, self.timeout_s)))
            for at, wait, _ in waiting:
                answers[at] = wait()
        except Failure as error:
            raise self._calls[at].failure(error, inputs, tools, self.timeout_s) from error
        finally:
            for _, _, give_up in waiting:
                give_up()
        return answers


class TrainerState(dict[str, Any]):
    """A dict whose keys are also attributes (`trainer_state.global_step`), as other libraries' functions expect."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"trainer_state has no {name!r}; it has {', '.join(self)}")
        return self[name]


def completion_texts(prompts: Sequence[Text], completion_ids: Sequence[Sequence[int]], tokenizer: Any) -> list[Text]:
    """Completions as reward functions get them: decoded without special tokens; assistant turns for conversations."""
    texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in completion_ids]
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _totals(per_function: Mapping[str, Sequence[float | None]]) -> dict[str, tuple[float, float]]:
    totals = {}
    for name, scores in per_function.items():
        said = [score for score in scores if score is not None]
        totals[f"rewards/{name}/mean"] = (math.fsum(said), float(len(said)))
        totals[f"rewards/{name}/std"] = (math.fsum(score * score for score in said), float(len(said)))
        totals[f"rewards/{name}/abstained"] = (float(len(scores) - len(said)), float(len(scores)))
    return totals


def deviations(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics` with each mean square "rewards/<function>/std" replaced by the standard deviation (of the population)."""
    means = {name: metrics[f"{name[:-3]}mean"] for name in metrics if _STD.fullmatch(name)}
    return {**metrics, **{name: deviation(metrics[name], mean) for name, mean in means.items()}}


def deviation(mean_square: float, mean: float) -> float:
    """Standard deviation; 0 if the variance is only rounding error, so that equal scores give 0."""
    variance = mean_square - mean * mean
    return variance**0.5 if variance > 1e-14 * mean_square else 0.0


def _unique(names: Iterable[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}_{n}") not in taken)
        taken.append(name if number == 1 else f"{name}_{number}")
    return taken
