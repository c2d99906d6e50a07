"""Two processes that save together, connected by a pipe; their files and SIGKILLs are real."""

import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlhf.runs.directory import RunDirectory
from tests.runs.content import CONFIG, shares, state

Writer = Callable[[RunDirectory, int], None]
BOTH = "both"
PATIENCE_S = 20.0
KILLED = -signal.SIGKILL


def directory(path: Path, rank: int, pipe: Connection) -> RunDirectory:
    """The run's directory in one of two processes; an exchange with one that has ended raises EOFError or OSError."""

    def gather(items: list[Any]) -> list[Any]:
        pipe.send(items)
        others = pipe.recv()
        return [*items, *others] if rank == 0 else [*others, *items]

    def barrier() -> None:
        gather([])

    return RunDirectory(path, is_main=rank == 0, barrier=barrier, gather=gather, rank=rank, processes=2)


def two(path: Path, work: Callable[[RunDirectory], None], resume: bool = True) -> list[int]:
    """Fork two processes, each of which opens the run and does `work`. Returns their exit codes: 0, or 3 after an error,
    or minus the signal. Both are in one process group. Fails if one hangs."""
    pipes = multiprocessing.Pipe()
    children: list[int] = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            pipes[1 - rank].close()
            _live(directory(path, rank, pipes[rank]), work, resume)
        os.setpgid(child, (children or [child])[0])
        children.append(child)
    for pipe in pipes:
        pipe.close()
    return [exit_code(child) for child in children]


def _live(run: RunDirectory, work: Callable[[RunDirectory], None], resume: bool) -> None:
    """A child's whole life."""
    code = 3
    try:
        warnings.simplefilter("ignore")
        run.open(resume=resume)
        work(run)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"a process hung for {PATIENCE_S} s after the other one had ended")


def save(run: RunDirectory, step: int) -> None:
    run.save(step, shares(step, run.rank), state(step), config=CONFIG)
