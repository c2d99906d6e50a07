"""Calls one reward function, with a deadline, in this process or in a worker process, and reports its failures.

A function object is called in this process, so that it can share state with the script that made it. `isolated(f)` runs
`f` in a worker process of its own, as do functions named on a command line: an endless loop, a crash or os._exit there
can neither hang nor end the run. In this process the deadline interrupts Python code, `re`, sleeping and waiting. If C
code does not return, the process is ended `GRACE_S` after the deadline, with the traceback on stderr. A `RewardModel`
has no deadline.
"""

import asyncio
import contextlib
import copy
import faulthandler
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from rlhf.errors import InputError, excerpt
from rlhf.isolation.worker_process import message_of, place
from rlhf.isolation.workers import Worker, WorkerDied, WorkerError, WorkerTimeout
from rlhf.rewards.functions import Signature, name_of, signature_of
from rlhf.rewards.logged import checked_column, checked_metric
from rlhf.rewards.model import RewardModel

SEARCH_S = 5.0
"""Seconds to spend on calling a failed function again, row by row, to find the row it fails on."""
ROW_S = 1.0
"""Seconds that one row may take in that search if the function passed its deadline."""
GRACE_S = 30.0
"""Seconds from the deadline until a process is ended whose reward function cannot be interrupted."""
Wait = Callable[[], Any]


class DeadlinePassed(BaseException):
    """Raised inside a function in this process. A BaseException, so that its `except Exception` does not catch it."""


Failure = (Exception, SystemExit, DeadlinePassed)
"""Exceptions that are reported as a failure of the function. KeyboardInterrupt is not: Ctrl-C ends the run."""


# --- in a worker process ---


class Isolated:
    """`function` in a worker process of its own: see `isolated`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function  # where inspect finds the signature
        self.__name__ = name_of(function)
        self.__doc__ = function.__doc__
        self.worker = Worker(_Recorded(function))

    def __call__(self, **keywords: Any) -> Any:
        return self.within(None, keywords)

    def within(self, timeout_s: float | None, keywords: dict[str, Any]) -> Any:
        """The function's answer. Its log calls are recorded in the worker and repeated here after it has returned."""
        tools = {name: keywords[name] for name in ("log_extra", "log_metric") if name in keywords}
        answer, logged = self.worker.call(keywords | dict.fromkeys(tools), timeout_s)
        for tool, name, value in logged:
            tools[tool](name, json.loads(value))
        return answer


def isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the same name and signature, run in a worker process of its own, which is forked now.

    Call this before a model is loaded. The function sees what exists now. Its changes stay in its process, which serves
    all calls and is replaced if it dies. Its answer must be plain data: numbers, None, text, lists. On systems without
    fork, returns `function` itself.
    """
    return Isolated(function) if hasattr(os, "fork") else function


class _Recorded:
    """Runs in the worker: returns [answer, log calls]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self._loop: asyncio.AbstractEventLoop | None = None  # kept for the clients that were opened in it

    def __call__(self, **keywords: Any) -> Any:
        logged: list[Any] = []
        for tool, checked in (("log_extra", checked_column), ("log_metric", checked_metric)):
            if tool in keywords:
                keywords[tool] = partial(self._record, logged, tool, checked)
        answer = self.function(**keywords)
        if inspect.isawaitable(answer):
            self._loop = self._loop or asyncio.new_event_loop()
            answer = self._loop.run_until_complete(_waited(answer))
        return [answer, logged]

    def _record(self, logged: list[Any], tool: str, checked: Callable[..., Any], name: Any, value: Any) -> None:
        """Refuses what cannot be written where it is said: only text goes to the trainer."""
        logged.append([tool, name, json.dumps(checked(self.__name__, name, value))])


# --- in this process ---


def call_within(timeout_s: float | None, function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    """The function's answer. After `timeout_s`, DeadlinePassed is raised inside it, and again every second if caught.

    The deadline works only in the main thread, on systems with SIGALRM, if the function leaves the alarm alone.
    """
    if timeout_s is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        with no_copies():
            return function(**keywords)
    running = True

    def ring(number: int, frame: Any) -> None:
        if running:
            raise DeadlinePassed

    before = signal.signal(signal.SIGALRM, ring)
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, max(timeout_s, 1e-3), 1.0)
    started = time.monotonic()
    try:
        try:
            with no_copies():
                return function(**keywords)
        finally:
            running = False
    finally:  # also if the alarm rings on the way out
        left = max(1e-3, seconds - (time.monotonic() - started)) if seconds else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def no_copies() -> Iterator[None]:
    """Ends a child process that the function forked and that returned from it: a child must not go on with the run."""
    me = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != me:
            os._exit(0)


@contextlib.contextmanager
def last_resort(timeout_s: float | None) -> Iterator[None]:
    """Ends this process `GRACE_S` after the deadline if the block still runs: other ranks would wait for ever."""
    if timeout_s is None or sys.__stderr__ is None:
        yield
        return
    faulthandler.dump_traceback_later(timeout_s + GRACE_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class EventLoop:
    """An asyncio loop in a thread of its own, started on first use and kept, so that clients that an async reward opens
    stay usable from step to step. A loop that already runs in the main thread (a notebook) does not interfere."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, awaitable: Awaitable[Any]) -> Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_caught(awaitable), self._loop)

    def abandon(self) -> None:
        """Gives up a loop that a function may block for ever; the next call gets a new one."""
        self._loop = None


async def _waited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def _caught(awaitable: Awaitable[Any]) -> Any:
    try:
        with no_copies():
            return await awaitable
    except SystemExit as error:  # raised here, it would end the loop unnoticed
        return error


# --- both ---


_UNCHANGING = {str, bytes, bool, int, float, type(None)}


def copied(value: Any) -> Any:
    """A copy of `value` that shares nothing mutable with it. What cannot be copied is returned as it is."""
    if type(value) in _UNCHANGING or callable(value):
        return value
    if type(value) is list or type(value) is tuple:
        plain = _UNCHANGING.issuperset(map(type, value))  # token ids or texts: the fast path
        return type(value)(value) if plain else type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # for example open files or locks
        return value


class RewardCall:
    """One reward function as `Rewards` calls it."""

    def __init__(self, function: Callable[..., Any], name: str, loop: EventLoop) -> None:
        self.function = function
        self.name = name
        self.loop = loop
        self.signature: Signature = signature_of(function)
        self.order = 0 if isinstance(function, Isolated) else 1 if self.signature.is_async else 2
        """Start order: functions in workers, then async ones, so that both run while the others compute here."""

    def start(self, keywords: dict[str, Any], timeout_s: float | None) -> tuple[Wait, Callable[[], Any]]:
        """Begins the call. Returns a function that waits for the answer and one that gives the call up.

        A sync function in this process has answered when this returns. The function gets copies of `keywords`: sending
        them to a worker copies them, and a `RewardModel` gets the originals, since it does not change them.
        """
        keywords = self.signature.select(keywords)
        if not isinstance(self.function, Isolated | RewardModel):
            keywords = {name: copied(value) for name, value in keywords.items()}
        if isinstance(self.function, Isolated):
            return self._in_worker(self.function, keywords, timeout_s)
        timeout_s = None if isinstance(self.function, RewardModel) else timeout_s
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        with last_resort(timeout_s):
            answer = call_within(timeout_s, self.function, keywords)
        if not inspect.isawaitable(answer):
            return lambda: answer, lambda: None
        future = self.loop.start(answer)
        return lambda: self._awaited(future, give_up), future.cancel

    def _in_worker(
        self, function: Isolated, keywords: dict[str, Any], timeout_s: float | None
    ) -> tuple[Wait, Callable[[], Any]]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function.within(timeout_s, keywords))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, name=f"waits-for-{self.name}", daemon=True)
        thread.start()

        def give_up() -> None:
            while not future.done():
                function.worker.interrupt()
                thread.join(0.1)

        return future.result, give_up

    def _awaited(self, future: Future[Any], give_up: float | None) -> Any:
        seconds = None if give_up is None else max(0.0, give_up - time.monotonic())
        try:
            with last_resort(seconds):
                answer = future.result(seconds)
        except TimeoutError:
            if future.done():  # raised by the function itself
                raise
            future.cancel()
            self.loop.abandon()
            raise DeadlinePassed from None
        if isinstance(answer, SystemExit):
            raise answer
        return answer

    def failure(
        self, error: BaseException, inputs: Mapping[str, Sequence[Any]], tools: dict[str, Any], timeout_s: float | None
    ) -> InputError:
        """The error to report: names function, row and line of the user's code. An InputError is returned unchanged."""
        if isinstance(error, InputError):
            return error
        late = isinstance(error, DeadlinePassed | WorkerTimeout)
        row = self._failing_row(error, inputs, tools, ROW_S if late else SEARCH_S)
        text = f"prompt {excerpt(inputs['prompts'][row or 0])}, completion {excerpt(inputs['completions'][row or 0])}"
        if late:
            where = "No single row" if row is None else f"Row {row} alone"
            return InputError(
                f"Reward function {self.name!r} did not return within reward_timeout_s={timeout_s:g} on "
                f"{len(inputs['prompts'])} completions. {where} takes longer than {ROW_S:g} s: {text}. Give the "
                "function a time limit of its own and return None for rows it cannot judge, or raise reward_timeout_s."
            )
        where = "only on the whole batch, which begins with" if row is None else f"on row {row},"
        return InputError(
            f"Reward function {self.name!r} {self._what(error)}. It fails {where} {text}. "
            "Repair it, or return None for rows it cannot judge."
        )

    def _what(self, error: BaseException) -> str:
        if isinstance(error, WorkerDied):
            return f"ended its process: {error}"
        if isinstance(error, WorkerError):
            return f"raised {error}"
        return f"raised {type(error).__name__}: {message_of(error)} (at {place(error, self.function)})"

    def _failing_row(
        self, error: BaseException, inputs: Mapping[str, Sequence[Any]], tools: dict[str, Any], row_s: float
    ) -> int | None:
        """The first row that alone makes the function fail in the same way; None if none is found in time."""
        ignore = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
        give_up = time.monotonic() + SEARCH_S
        for row in range(len(inputs["prompts"])):
            seconds = min(row_s, give_up - time.monotonic())
            if seconds <= 0:
                return None
            try:
                alone = {name: [values[row]] for name, values in inputs.items()}
                self.start(alone | tools | ignore, seconds)[0]()
            except Failure as again:
                if _alike(error, again):
                    return row
        return None


def _alike(error: BaseException, again: BaseException) -> bool:
    if isinstance(error, WorkerError) and isinstance(again, WorkerError):
        return error.type_name == again.type_name
    return type(error) is type(again)
