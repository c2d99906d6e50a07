"""Several processes end together, with the reason: each tells what it does, and what ends it, to a hub beside rank 0.

`phase` names what this process does. With one process that is all. With several, a thread of each holds a connection to
the hub (`start`), and the hub tells all of them about the first that fails (`report`), whose process ends without a word,
or that does not take part in what the others wait for. An error that is only a consequence of that is replaced by one
that names the rank, its step and its phase. A process that does not end by itself then, since it hangs or computes in
code that nobody can interrupt, is ended by its thread.

Only what happened counts, never silence: a loaded machine cannot end a healthy run. Python threads do not run while C
code keeps the interpreter to itself; such a process is left to the launcher, which kills it after a while (torchrun: 30 s).
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

import torch.distributed as dist

from rlhf.errors import TrainingError
from rlhf.lifeline_hub import Hub, encoded, place

GRACE_S = 2.0
"""Seconds that a process in its loop has to end by itself once another has failed; its thread ends it then."""
GRACE_ELSEWHERE_S = 0.3
"""The same outside the loop, where a launcher's SIGTERM ends a process before it can say why."""
LINGER_S = 0.8
"""Seconds that a process which fails outside the loop waits before it ends, so that the others can say why they end."""
AFTER_S = GRACE_S + 1.0
"""Seconds that a process which has lost others waits before it ends: launchers name the first that ends as the cause."""
VERDICT_S = 5.0
"""Seconds to wait for the hub to say what became of the others."""
_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset) by peer", re.IGNORECASE)
_NOTE = "rlhf: this was rank "

_step = 0
_phases: tuple[str, ...] = ("start",)
_line: "Lifeline | None" = None


# ---- what this process does ----


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Context, or decorator, of a part of the step; phases may be nested. An error leaves it as it is, to be reported."""
    outer = _phases
    _now(_step, (*outer, name))
    yield
    _now(_step, outer)


def now(step: int, name: str = "loop") -> None:
    """This process is in `step`, in no phase in particular: in the loop, or at its "end"."""
    _now(step, (name,))


def _now(step: int, phases: tuple[str, ...]) -> None:
    global _step, _phases
    _step, _phases = step, phases
    if _line is not None:
        _line.tell()


def _phase() -> str:
    return "/".join(_phases[1:]) or _phases[0]


# ---- what ends it ----


def report(error: BaseException, saved: str = "see what is saved") -> BaseException:
    """Call with the error that ends the run, or the process; returns the one to raise. That is `error`, of which the others
    are told, unless they caused it: then it is another one, which says so, and ends with `saved`."""
    if isinstance(error, KeyboardInterrupt) or _is_reported(error):
        return error
    note = f"{_NOTE}{_name()}, in {place(_step, _phase())}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        error.add_note(note)
    if _line is None:
        return error
    if not _is_communication(error):
        _line.end("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:600].rstrip('.')}.")
        return error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, before this process could say why it ends
    reason = _line.end("lost", str(error).splitlines()[0][:300])
    time.sleep(AFTER_S)
    ended = TrainingError(f"{reason} This process cannot go on alone; {saved}.")
    ended.add_note(note)
    ended.__suppress_context__ = True
    return ended


def leave(error: BaseException, show: Callable[[], None]) -> None:
    """`report` and `show` an error that ends the process, and wait until the others can have said that they end too."""
    fresh = not (_line is None or isinstance(error, KeyboardInterrupt) or _is_reported(error))
    ended = report(error)
    show()  # before the others end, upon which a launcher may end this process
    if ended is not error:
        print(f"rlhf: {ended}", file=sys.stderr)
    elif fresh:
        time.sleep(LINGER_S)


def _name() -> str:
    """As launchers say, also before processes are connected."""
    return f"{os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"


def _is_reported(error: BaseException) -> bool:
    return any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ()))


def _is_communication(error: BaseException) -> bool:
    """Whether a process that ended, or did not come, caused this error: NCCL has a type for it, gloo a text."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _COMMUNICATION.search(str(error)) is not None
    )


# ---- the connection ----


def start(rank: int, world_size: int, share: Callable[[Any], Any]) -> None:
    """Connect this process with the others, once. share: gives rank 0's argument to all; all processes call this."""
    global _line
    if _line is not None:
        return
    hub = Hub(world_size) if rank == 0 else None
    port, token = share(hub and (hub.port, hub.token))
    address = (os.environ.get("MASTER_ADDR", "localhost") if rank else "localhost", port)
    try:
        connection = socket.create_connection(address, timeout=10.0)
        connection.sendall(encoded((token, rank)))
    except OSError as error:
        text = (
            f"rlhf: rank {rank} cannot reach {address[0]}:{port} ({error}): if a process fails, others may not say why"
        )
        print(text, file=sys.stderr)
        return
    connection.settimeout(None)
    _line = Lifeline(rank, world_size, connection, hub)
    Finalize(None, _line.close, exitpriority=0)  # as atexit, and in processes that multiprocessing made
    os.register_at_fork(after_in_child=_line.drop)
    _report_uncaught()


def _report_uncaught() -> None:
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        leave(error, lambda: previous(kind, error, traceback))

    sys.excepthook = hook


class Lifeline:
    """This process's connection to the hub, and the thread that listens to it."""

    def __init__(self, rank: int, world_size: int, connection: socket.socket, hub: Hub | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._connection = connection
        self._hub = hub
        self._lock = threading.Lock()
        self._ends = 0  # how often a run of this process has ended in an error: as often on all, if they fail alike
        self._ended = False  # whether it has since done nothing else
        self._hub_at = place(0, "start")
        self._reason: str | None = None
        self._heard = threading.Event()
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def tell(self) -> None:
        """Tell the hub what this process does now. What is sent arrives even if the process is killed right after."""
        if self._ended:
            self._ended = False
            self._heard.clear()
        self._send("at", _step, _phase())

    def end(self, kind: str, text: str) -> str:
        """Tell the hub that a run has ended here, in a failure or since the others were lost; the reason, for all."""
        self._ends += 1
        self._ended = True
        self._send(kind, text)
        if self._heard.wait(VERDICT_S) and self._reason is not None:
            return self._reason
        return f"Rank 0 does not answer; it was last heard of in {self._hub_at}. The error here: {text}"

    def close(self) -> None:
        """At the end of the process: tell that it ends by itself."""
        self._send("bye")
        if self._hub is not None:
            self._hub.close()

    def drop(self) -> None:
        """In a forked child: its copies of the connections would hide that this process has ended."""
        global _line
        _line = None
        os.close(self._connection.detach())
        if self._hub is not None:
            self._hub.drop()

    def _send(self, *message: Any) -> None:
        if self._hub is not None:  # at once: if rank 0 is killed, its other threads are too
            self._hub.hear(self.rank, *message)
            return
        with self._lock, suppress(OSError):
            self._connection.sendall(encoded(message))

    def _listen(self) -> None:
        left = False
        with suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                kind, *values = json.loads(line)
                if kind == "at":
                    self._hub_at, left = place(*values), values[1] == "end"
                elif kind == "end":
                    self._hear(*values)
                elif kind == "bye":
                    left = True
        if left:  # rank 0 has ended by itself
            return
        number = self._ends if self._ended else self._ends + 1
        self._hear(number, f"Rank 0 of {self.world_size} was killed or crashed in {self._hub_at}.")

    def _hear(self, number: int, reason: str) -> None:
        """A run has ended for the `number`th time; a process whose own has not, and does not soon, is ended."""
        if not self._heard.is_set():
            self._reason = reason
        self._heard.set()
        in_loop = _phases[0] == "loop"
        if self._ends < number:
            time.sleep(GRACE_S if in_loop else GRACE_ELSEWHERE_S)
        if self._ends < number:
            self._say_last(reason)
            time.sleep(0.0 if in_loop else AFTER_S)
            os._exit(1)

    def _say_last(self, reason: str) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        at = f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
        where = f"rank {_name()} is in {place(_step, _phase())}{at}"

        def say() -> None:
            print(f"rlhf: {reason} This process ends too: {where}.", file=sys.stderr, flush=True)
            sys.stdout.flush()

        last = threading.Thread(target=say, daemon=True)  # the main thread may hold a stream for ever
        last.start()
        last.join(1.0)
