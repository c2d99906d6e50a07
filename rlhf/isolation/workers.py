"""Runs a Python function in a worker process, where it can neither hang nor end the run.

worker = Worker(function)                      # forks: make it before a GPU is used
worker.call({"text": "1 + 1"}, timeout_s=5.0)  # function(text="1 + 1"), again and again
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import InputError
from rlhf.isolation.worker_process import ANSWER_LIMIT, LENGTH, STATUS, decode, readable, send_frame, supervise

OUTPUT_LIMIT = 64 * 2**10
"""Limit of what one call may print, in bytes; the rest is dropped, with a note."""
_CONTROLS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class WorkerTimeout(Exception):
    """No answer in time. The worker and all processes it had started were killed."""


class WorkerDied(Exception):
    """The worker's process ended during the call. `code`: its exit code, or minus the signal that killed it."""

    def __init__(self, code: int) -> None:
        self.code = code
        named = {s.value: s.name for s in signal.Signals}
        super().__init__(f"exit code {code}" if code >= 0 else f"killed by {named.get(-code, f'signal {-code}')}")


class WorkerError(Exception):
    """The function raised: the exception's type, its message and the file:line of the function's own code."""

    def __init__(self, type_name: str, message: str, place: str) -> None:
        self.type_name = type_name
        self.message = message
        self.place = place
        super().__init__(f"{type_name}: {message} (at {place})")


class _Ended(Exception):
    """The worker or its supervisor ended."""


class Worker:
    """Calls `function(**kwargs)` in a worker process, one call at a time. A new worker replaces one that died.

    Answers come back as plain data: None, booleans, numbers, text and lists (arrays and tensors as lists), at most
    `ANSWER_LIMIT` bytes of JSON; other values as `Described`. What the worker sends is never executed or unpickled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._owner = 0
        self._supervisor()

    def call(self, kwargs: Mapping[str, Any], timeout_s: float | None = None) -> Any:
        """The function's answer. Raises WorkerTimeout, WorkerDied, WorkerError, or the function's own InputError.

        kwargs: anything that can be pickled. timeout_s: time limit; None for no limit.
        """
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            arguments = pickle.dumps(dict(kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            name = getattr(self.function, "__name__", self.function)
            raise InputError(
                f"The arguments of {name!r} cannot be sent to its process: {type(error).__name__}: {error}. "
                "Give it plain data: numbers, text, lists and dictionaries."
            ) from error
        with self._lock:
            try:
                reply = self._ask(arguments, give_up)
            except _Ended:
                raise WorkerDied(self._stop()) from None
            except BaseException:  # also Ctrl-C: the next call must not receive this one's answer
                self._stop()
                raise
        if "answer" in reply:
            return reply["answer"]
        failure = reply["error"]
        if failure["input"]:
            raise InputError(failure["message"])
        raise WorkerError(failure["type"], failure["message"], failure["place"])

    def interrupt(self) -> None:
        """Kills the worker; a call that another thread waits for then raises WorkerDied."""
        with contextlib.suppress(OSError):
            self._control.send(b"K")

    def close(self) -> None:
        """Ends both processes. A later call starts them again."""
        with self._lock:
            self._stop()
            self._release()
            self._owner = 0

    # --- processes ---

    def _supervisor(self) -> None:
        """Forks the supervisor, unless this process has one already."""
        if self._owner == os.getpid():
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or the child might print the buffered text again
        self._control, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                for control in _CONTROLS | {self._control}:
                    control.close()  # else the other supervisors would not see that the trainer is gone
                supervise(self.function, theirs, parent)
            finally:
                os._exit(1)
        theirs.close()
        _CONTROLS.add(self._control)
        self._control.settimeout(10.0)  # usually it answers at once
        self._owner = parent
        self._running = False
        self._calls = 0
        self._supervisor_pid = pid
        self._release = weakref.finalize(self, _end, self._control, pid, parent)

    def _start(self) -> None:
        """Starts a worker, unless one is waiting for its next call."""
        self._supervisor()
        if self._running and not readable([self._control.fileno()], 0):
            return
        self._stop()  # a worker that died between two calls
        self._supervisor()
        channel, theirs = socket.socketpair()
        output_end, output = os.pipe()
        self._running = True
        self._channel = channel
        self._output = output_end
        try:
            socket.send_fds(self._control, [b"S"], [theirs.fileno(), output])
        except OSError:  # the supervisor itself was killed
            raise _Ended from None
        finally:
            theirs.close()
            os.close(output)

    def _stop(self) -> int:
        """Kills the worker and all it started; returns its exit code, -SIGKILL if it had not ended by itself."""
        if self._owner != os.getpid() or not self._running:
            return -signal.SIGKILL
        self._running = False
        self._channel.close()
        os.close(self._output)
        self.interrupt()
        try:
            status = self._control.recv(STATUS.size, socket.MSG_WAITALL)
        except OSError:
            status = b""
        if len(status) == STATUS.size:
            return os.waitstatus_to_exitcode(STATUS.unpack(status)[0])
        with contextlib.suppress(ProcessLookupError):  # the supervisor is dead, or cannot kill the worker
            os.kill(self._supervisor_pid, signal.SIGKILL)
        self._release()
        self._owner = 0
        return -signal.SIGKILL

    # --- one call ---

    def _ask(self, arguments: bytes, give_up: float | None) -> dict[str, Any]:
        self._start()
        self._calls += 1
        printed = _Printed(self._output)
        answer = bytearray()
        channel, control = self._channel.fileno(), self._control.fileno()
        sources = [channel, self._output, control]
        try:
            self._send(LENGTH.pack(self._calls) + arguments, give_up)
            while True:
                ready = readable(sources, _remaining(give_up))
                if self._output in ready and not printed.pass_on():
                    sources.remove(self._output)  # the function closed its stdout and stderr
                if channel in ready and self._read(answer):
                    return self._parse(bytes(answer[LENGTH.size :]))
                if ready == [control]:  # the worker has ended, and all that it sent has been read
                    raise _Ended
        finally:
            printed.finish()

    def _send(self, request: bytes, give_up: float | None) -> None:
        self._channel.settimeout(_remaining(give_up))
        try:
            send_frame(self._channel, request)
        except TimeoutError:
            raise WorkerTimeout from None
        except OSError:
            raise _Ended from None

    def _read(self, answer: bytearray) -> bool:
        """Reads the next part of the answer; True when the answer is complete."""
        try:
            part = self._channel.recv(2**20)
        except OSError:
            part = b""
        if not part:
            raise _Ended
        answer += part
        if len(answer) < LENGTH.size:
            return False
        (length,) = LENGTH.unpack_from(answer)
        if length > ANSWER_LIMIT + 2**16:
            raise WorkerError("OverflowError", f"its answer has {length} bytes; at most {ANSWER_LIMIT} are read", "?")
        return len(answer) >= LENGTH.size + length

    def _parse(self, body: bytes) -> dict[str, Any]:
        try:
            (number,) = LENGTH.unpack_from(body)
            reply = decode(body[LENGTH.size :])
            if number == self._calls and reply.keys() in ({"answer"}, {"error"}):
                return reply
        except (ValueError, RecursionError, AttributeError, LookupError):
            pass
        raise WorkerError("ValueError", "its process sent something other than an answer", "?")


class _Printed:
    """Passes on what a worker prints during one call, up to `OUTPUT_LIMIT`; drops the rest."""

    def __init__(self, source: int) -> None:
        self.source = source
        self.count = 0

    def pass_on(self) -> bool:
        """Passes on the next piece; False at the end of the stream."""
        part = os.read(self.source, 2**16)
        keep = part[: max(0, OUTPUT_LIMIT - self.count)]
        if keep:
            sys.stdout.write(keep.decode(errors="replace"))
        if self.count <= OUTPUT_LIMIT < self.count + len(part):
            sys.stdout.write(f"\n(what this call of a reward function prints beyond {OUTPUT_LIMIT} bytes is dropped)\n")
        self.count += len(part)
        return bool(part)

    def finish(self) -> None:
        """Passes on what was printed before the answer, without waiting for more; reads at most 64 pieces."""
        for _ in range(64):
            if not readable([self.source], 0) or not self.pass_on():
                break
        sys.stdout.flush()


def _remaining(give_up: float | None) -> float | None:
    """Seconds until `give_up`; WorkerTimeout if none are left."""
    if give_up is None:
        return None
    if (seconds := give_up - time.monotonic()) <= 0:
        raise WorkerTimeout
    return seconds


def _end(control: socket.socket, supervisor: int, owner: int) -> None:
    """Ends a supervisor and all that it started."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)  # works even if a child of this process holds the socket too
    control.close()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(supervisor, 0)
