"""The code of the two processes behind an `rlhf.isolation.workers.Worker`: a supervisor, and the worker that it forks.

The supervisor is forked when the Worker is made, so that it holds neither a model nor a GPU. It has one thread and only
waits, so that it can fork a new worker quickly and safely at any time of the run. It kills the worker's process group
(which includes what the function started) on command, when the worker ends, and when the trainer is gone.

trainer --control--> supervisor        "S" with two descriptors: start a worker on them; "K": kill it
trainer <--control-- supervisor        4 bytes: the wait status of a worker that ended; exactly one for each "S"
trainer <--channel-> worker            frames of 8 bytes of length and a body: a pickle down, JSON up
trainer <--output--- worker            what the function prints
"""

import ctypes
import faulthandler
import json
import math
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch

from rlhf.errors import InputError, excerpt

ANSWER_LIMIT = 16 * 2**20
"""Size limit of one answer, in bytes of JSON. One score for each of 100,000 completions takes 2 MB."""
MESSAGE_LIMIT = 2000
"""Length limit of an exception's message, in characters; the rest is cut."""
LENGTH, STATUS = struct.Struct(">Q"), struct.Struct(">i")


# --- answers as plain data ---


class Described:
    """Stands for a value that is not plain data. `kind`: its type. `text`: its shortened repr, returned by repr too."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text

    def __repr__(self) -> str:
        return self.text


def plain(value: Any, depth: int = 4) -> Any:
    """`value` as None, booleans, numbers, text and lists of these; anything else as the JSON of a `Described`.

    Arrays and tensors of 0 or 1 dimensions become numbers and lists; no answer needs more dimensions.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64 if value.is_floating_point() else None).numpy()
    if isinstance(value, np.generic | np.ndarray) and value.ndim <= 1:
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 4096):
        return value
    if isinstance(value, list | tuple) and depth:
        return [plain(item, depth - 1) for item in value]
    if isinstance(value, np.ndarray):
        return {"kind": "an array of shape", "text": str(value.shape)}
    return {"kind": type(value).__name__, "text": excerpt(value)}


def decode(body: bytes) -> Any:
    """Parses the JSON of an answer; ValueError or RecursionError if that fails."""
    return json.loads(body, object_hook=lambda o: Described(**o) if o.keys() == {"kind", "text"} else o)


# --- frames ---


def readable(descriptors: list[int], timeout_s: float | None) -> list[int]:
    """The descriptors that can be read or have ended, after at most `timeout_s`. Unlike select, not limited to 1024."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    ready = dict(poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)))
    return [descriptor for descriptor in descriptors if descriptor in ready]


def send_frame(channel: socket.socket, body: bytes) -> None:
    channel.sendall(LENGTH.pack(len(body)) + body)


def _receive_frame(channel: socket.socket) -> bytes:
    (length,) = LENGTH.unpack(_receive(channel, LENGTH.size))
    return _receive(channel, length)


def _receive(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 2**20))
        if not part:
            os._exit(0)  # the trainer has closed its end
        parts += part
    return bytes(parts)


# --- the worker ---


def place(error: BaseException, function: Any) -> str:
    """file:line where `error` passed through the function's own file, rather than a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1] if frames else None
    return "an unknown line" if frame is None else f"{frame.filename}:{frame.lineno}"


def message_of(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "..."


def _reply(function: Callable[..., Any], request: bytes) -> str:
    """JSON of the answer, or of the error that the function raised (including SystemExit)."""
    user_function = getattr(function, "function", function)
    try:
        arguments = pickle.loads(request)  # safe: the trainer sent it
        answer = json.dumps({"answer": plain(function(**arguments))})
        if len(answer) > ANSWER_LIMIT:
            raise OverflowError(f"its answer has {len(answer)} bytes as JSON; at most {ANSWER_LIMIT} are passed on")
        return answer
    except BaseException as error:
        try:
            report = {"type": type(error).__name__, "message": message_of(error), "place": place(error, user_function)}
        except BaseException:  # for example an exception whose __str__ raises
            report = {"type": type(error).__name__, "message": "(its message cannot be shown)", "place": "?"}
        return json.dumps({"error": report | {"input": isinstance(error, InputError)}})


def _serve(function: Callable[..., Any], channel: socket.socket, output: int) -> NoReturn:
    """Answers one request after another until the channel is closed."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2, all_threads=False)  # the traceback of a crash reaches the user with the output
    torch.set_num_threads(1)
    me = os.getpid()
    while True:
        request = _receive_frame(channel)
        reply = _reply(function, request[LENGTH.size :])
        if os.getpid() != me:  # a child that the function forked has returned here
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        send_frame(channel, request[: LENGTH.size] + reply.encode())


# --- the supervisor ---


def supervise(function: Callable[..., Any], control: socket.socket, parent: int) -> NoReturn:
    """Never returns and never raises: this process is a fork of the trainer and must not run the trainer's code."""
    try:
        os.setsid()  # out of the terminal's group: Ctrl-C is for the trainer
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _supervise(function, control, parent)  # however this ends, the worker dies too (_die_with)
    finally:
        os._exit(0)


def _supervise(function: Callable[..., Any], control: socket.socket, parent: int) -> None:
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = 0
    while os.getppid() == parent:  # checked every second: another child of the trainer may hold control open
        ready = readable([control.fileno(), woken], 1.0)
        if woken in ready:
            os.read(woken, 4096)
        command = None
        if control.fileno() in ready:
            command, descriptors, *_ = socket.recv_fds(control, 1, 2)
            if not command:
                break
        if command == b"S":
            worker = _fork_worker(function, control, *descriptors)
        ended, status = os.waitpid(worker, 0 if _killed(worker, command) else os.WNOHANG) if worker else (0, 0)
        if ended:
            _kill_group(worker)  # processes that it left behind
            worker = 0
            control.sendall(STATUS.pack(status))
    if worker:
        _kill_group(worker)


def _killed(worker: int, command: bytes | None) -> bool:
    if command == b"K":
        _kill_group(worker)
    return command == b"K"


def _die_with(parent: int) -> None:
    """Makes this process die with `parent` (Linux only): nobody else could then end a function that loops."""
    with suppress(Exception):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _kill_group(worker: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError if only zombies are left
        os.killpg(worker, signal.SIGKILL)


def _fork_worker(function: Callable[..., Any], control: socket.socket, channel: int, output: int) -> int:
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            _die_with(supervisor)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _serve(function, socket.socket(fileno=channel), output)
        finally:
            os._exit(1)
    with suppress(OSError):  # both processes call it, since either may run first
        os.setpgid(worker, worker)
    os.close(channel)
    os.close(output)
    return worker
