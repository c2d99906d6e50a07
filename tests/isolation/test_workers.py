"""A worker answers, or says in time why not, whatever the function does; and then it serves again."""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rlhf.errors import InputError
from rlhf.isolation.worker_process import ANSWER_LIMIT
from rlhf.isolation.workers import OUTPUT_LIMIT, Worker, WorkerDied, WorkerError, WorkerTimeout

LATEST = 20.0
"""Seconds by which everything must have ended; only prevents a hang."""


def do(action="echo", value=None, file=None):
    """What a function may do to the process it runs in."""
    if action == "echo":
        return value
    if action == "long":
        return "x" * value
    if action == "pid":
        return os.getpid()
    if action == "loop":
        while True:
            pass
    if action == "sleep":
        time.sleep(value)
    if action == "power":
        return 9 ** (9**9)  # inside C code, which no Python signal handler interrupts
    if action == "exit":
        sys.exit(value)
    if action == "os_exit":
        os._exit(value)
    if action == "segfault":
        ctypes.string_at(0)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise value
    if action == "print":
        print("x" * value)
        os.write(2, b"y" * value)
    if action == "fork_and_sleep":  # the fork holds all the worker's descriptors
        if os.fork() == 0:
            file.write_text(str(os.getpid()))
            time.sleep(1000)
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        if value == "hang":
            time.sleep(1000)
        if value == "exit":
            os._exit(3)
    if action == "fork_and_return":
        if os.fork() == 0:
            return "from the fork"
        time.sleep(0.2)
        return "from the worker"
    if action == "close_all":
        os.closerange(0, 100)
        time.sleep(1000)
    if action == "print_for_ever":
        while True:
            print("x" * 1000)
    if action == "foreign_answer":  # to every socket there is
        for descriptor in range(3, 100):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.write(descriptor, (8).to_bytes(8, "big") + b"nonsense")
        time.sleep(1000)
    return None


@pytest.fixture(scope="module")
def worker():
    worker = Worker(do)
    yield worker
    worker.close()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid):
    give_up = time.monotonic() + LATEST
    while alive(pid) and time.monotonic() < give_up:
        time.sleep(0.01)
    return not alive(pid)


# --- answers ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        pytest.param("text \ud800 é", "text \ud800 é", id="text with a lone surrogate"),
        ([1, 2.5, True, None, "a"], [1, 2.5, True, None, "a"]),
        ((1, [2, (3,)]), [1, [2, [3]]]),
        (10**400, 10**400),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (np.array([1, "a", None], dtype=object), [1, "a", None]),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True), [1.0, 2.0]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([True]), [True]),
        (float("inf"), float("inf")),
    ],
)
def test_plain_data_comes_back_as_it_is(worker, value, expected):
    answer = worker.call({"value": value}, LATEST)
    assert answer == expected and type(answer) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"a": 1}, "dict", "{'a': 1}"),
        (3 + 0j, "complex", "(3+0j)"),
        (torch.ones(2, 1), "an array of shape", "(2, 1)"),
        (threading.Event, "type", "<class 'threading.Event'>"),
        pytest.param(10**5000, "int", "<ValueError in its repr>", id="int of 5000 digits"),
    ],
)
def test_anything_else_comes_back_as_a_description(worker, value, kind, text):
    answer = worker.call({"value": [value]}, LATEST)[0]
    assert (answer.kind, repr(answer)) == (kind, text)


def test_the_same_process_answers_again_and_again(worker):
    pids = {worker.call({"action": "pid"}, LATEST) for _ in range(20)}
    assert len(pids) == 1 and os.getpid() not in pids


def test_what_the_function_remembers_stays():
    seen = []
    worker = Worker(lambda value: seen.append(value) or len(seen))
    assert [worker.call({"value": 0}, LATEST) for _ in range(3)] == [1, 2, 3] and seen == []
    worker.close()


# --- failures ---


def loses(worker, kwargs, timeout_s=LATEST):
    """The error, after which the worker must serve again."""
    started = time.monotonic()
    with pytest.raises((WorkerTimeout, WorkerDied, WorkerError, InputError)) as error:
        worker.call(kwargs, timeout_s)
    assert time.monotonic() - started < LATEST
    assert worker.call({"value": "still here"}, LATEST) == "still here"
    return error.value


@pytest.mark.parametrize("action", ["loop", "power", "sleep", "print_for_ever"])
def test_a_function_that_does_not_return_is_killed_in_time(worker, action):
    pid = worker.call({"action": "pid"}, LATEST)
    assert isinstance(loses(worker, {"action": action, "value": 1000}, timeout_s=0.3), WorkerTimeout)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("kwargs", "code", "text"),
    [
        ({"action": "os_exit", "value": 3}, 3, "exit code 3"),
        ({"action": "os_exit", "value": 0}, 0, "exit code 0"),
        ({"action": "segfault"}, -signal.SIGSEGV, "killed by SIGSEGV"),
        ({"action": "kill"}, -signal.SIGKILL, "killed by SIGKILL"),
        ({"action": "close_all"}, -signal.SIGKILL, "killed by SIGKILL"),
    ],
)
def test_a_function_that_ends_its_process_is_known_by_its_exit_code(worker, kwargs, code, text):
    error = loses(worker, kwargs)
    assert isinstance(error, WorkerDied) and error.code == code and str(error) == text


@pytest.mark.parametrize(
    ("kwargs", "type_name", "message"),
    [
        ({"action": "raise", "value": KeyError("x")}, "KeyError", "'x'"),
        ({"action": "exit", "value": 4}, "SystemExit", "4"),
        ({"action": "raise", "value": KeyboardInterrupt()}, "KeyboardInterrupt", ""),
        ({"action": "raise", "value": ValueError("x" * 10**6)}, "ValueError", "x" * 2000 + "..."),
        (
            {"action": "long", "value": 10**8},
            "OverflowError",
            f"its answer has 100000014 bytes as JSON; at most {ANSWER_LIMIT}",
        ),
    ],
)
def test_a_function_that_raises_says_what_and_where_and_keeps_its_process(worker, kwargs, type_name, message):
    pid = worker.call({"action": "pid"}, LATEST)
    error = loses(worker, kwargs)
    assert isinstance(error, WorkerError)
    assert error.type_name == type_name and error.message.startswith(message) and len(error.message) < 2100
    assert "raise" not in kwargs.values() or "test_workers.py:" in error.place
    assert worker.call({"action": "pid"}, LATEST) == pid


def test_an_input_error_is_passed_on_as_it_is(worker):
    error = loses(worker, {"action": "raise", "value": InputError("rename the column")})
    assert type(error) is InputError and str(error) == "rename the column"


def test_an_answer_that_is_none_of_ours_is_refused(worker):
    error = loses(worker, {"action": "foreign_answer"})
    assert isinstance(error, WorkerError) and "something other than an answer" in str(error)


def test_arguments_that_cannot_be_sent_are_named_before_anything_is_sent(worker):
    assert "cannot be sent" in str(loses(worker, {"value": lambda: 0}))


@pytest.mark.parametrize(("then", "expected"), [("hang", WorkerTimeout), ("exit", WorkerDied)])
def test_what_the_function_started_is_killed_with_it(worker, tmp_path, then, expected):
    file = tmp_path / "pid"
    error = loses(worker, {"action": "fork_and_sleep", "value": then, "file": file}, timeout_s=2.0)
    assert isinstance(error, expected) and wait_until_dead(int(file.read_text()))


def test_a_fork_that_returns_from_the_function_does_not_answer(worker):
    for _ in range(2):
        assert worker.call({"action": "fork_and_return"}, LATEST) == "from the worker"


def test_a_worker_killed_from_outside_between_two_calls_is_replaced(worker):
    os.kill(worker.call({"action": "pid"}, LATEST), signal.SIGKILL)
    time.sleep(0.2)
    assert worker.call({"value": 1}, LATEST) == 1


def test_a_supervisor_killed_from_outside_is_replaced(worker):
    worker.call({}, LATEST)
    os.kill(worker._supervisor_pid, signal.SIGKILL)
    wait_until_dead(worker._supervisor_pid)  # a busy machine takes a while, and the worker serves until then
    with contextlib.suppress(WorkerDied):
        worker.call({}, LATEST)
    assert worker.call({"value": 1}, LATEST) == 1


def test_another_thread_can_interrupt_a_call(worker):
    worker.call({}, LATEST)
    timer = threading.Timer(0.3, worker.interrupt)
    timer.start()
    assert isinstance(loses(worker, {"action": "loop"}), WorkerDied)
    timer.join()


# --- output, and the end ---


def test_what_is_printed_is_passed_on_up_to_a_limit_and_a_note(worker, capsys):
    assert worker.call({"action": "print", "value": 100}, LATEST) is None
    assert sorted(capsys.readouterr().out) == sorted("x" * 100 + "\n" + "y" * 100)
    worker.call({"action": "print", "value": 50_000_000}, LATEST)
    out = capsys.readouterr().out
    assert out[:OUTPUT_LIMIT] == "x" * OUTPUT_LIMIT
    assert len(out) < OUTPUT_LIMIT + 200 and out.count("is dropped") == 1
    worker.call({"action": "print", "value": 1}, LATEST)
    assert capsys.readouterr().out.count("y") == 1  # nothing of the earlier call's


ENDS = """
import os, sys, time
from rlhf.isolation.workers import Worker
def pid_then_loop(loop):
    if loop:
        print(os.getpid(), flush=True)
        while True: pass
    return os.getpid()
idle, busy = Worker(pid_then_loop), Worker(pid_then_loop)
print(idle.call({"loop": False}), flush=True)
busy.call({"loop": True})
"""


def test_worker_and_what_it_runs_end_when_the_trainer_is_killed():
    trainer = subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, text=True)
    pids = [int(trainer.stdout.readline()) for _ in range(2)]
    assert all(map(alive, pids))
    trainer.kill()
    trainer.wait()
    assert all(map(wait_until_dead, pids))


def test_a_closed_worker_leaves_no_process():
    worker = Worker(do)
    pids = [worker._supervisor_pid, worker.call({"action": "pid"}, LATEST)]
    worker.close()
    assert all(map(wait_until_dead, pids))
    assert worker.call({"value": 1}, LATEST) == 1  # and it can be used again
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_looping_function_does_not_outlive_a_supervisor_that_was_killed():
    worker = Worker(do)
    pid = worker.call({"action": "pid"}, LATEST)

    def loop():
        with pytest.raises(WorkerDied):
            worker.call({"action": "loop"}, LATEST)

    thread = threading.Thread(target=loop)
    thread.start()
    time.sleep(0.2)
    os.kill(worker._supervisor_pid, signal.SIGKILL)
    wait_until_dead(pid)
    thread.join(LATEST)
    worker.close()
    assert not alive(pid) and not thread.is_alive()
