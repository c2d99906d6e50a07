"""Two real processes of a group (gloo), forked from a server that has imported everything: a start takes no seconds.

There is no launcher, so that what ends a process is our own doing: nobody sends it a signal.
"""

import atexit
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.trainers.ranks", "tests.tiny", "rlhf.isolation.workers"])


@dataclass(frozen=True)
class Rank:
    """How one process ended. code: its exit status; -9 if it was killed. at: `time.time()` of its end."""

    code: int | None
    at: float
    printed: str


def two(out: Path, job: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Rank]:
    """Run job(rank, *arguments) in two processes; one that has not ended after `timeout_s` gets the code None."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    files = [out / f"printed.{rank}" for rank in range(2)]
    processes = [
        CONTEXT.Process(target=_be, args=(rank, port, str(files[rank]), job, arguments), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    ends: dict[int, float] = {}
    give_up = time.monotonic() + timeout_s
    while len(ends) < 2 and time.monotonic() < give_up:
        ends |= {r: time.time() for r, p in enumerate(processes) if r not in ends and p.exitcode is not None}
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [
        Rank(code, ends.get(rank, time.time()), files[rank].read_text(errors="replace"))
        for rank, code in enumerate(codes)
    ]


def _be(rank: int, port: int, printed: str, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One process, from its first to its last breath as Python's own main program has it."""
    to = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in address.items()}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and leaks if one is killed
    code: Any = 0
    try:
        job(rank, *arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)
