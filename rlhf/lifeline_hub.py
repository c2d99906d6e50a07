"""The hub of a run of several processes: a thread beside rank 0 that hears of all, and tells all what ended one."""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

DIAGNOSIS_S = 2.0
"""Seconds from the first process that lost others until those that have not said so are named as the reason."""


def encoded(message: tuple[Any, ...]) -> bytes:
    """One line of what processes and hub say to each other."""
    return json.dumps(message).encode() + b"\n"


def place(step: int, phase: str) -> str:
    return f"step {step}, phase {phase}"


@dataclass
class Peer:
    """What the hub knows of a process."""

    at: str = place(0, "start")
    since: float = field(default_factory=time.monotonic)
    ends: int = 0
    """How often a run has ended in an error here."""
    ended: bool = False
    """Whether it has done nothing since the last of them."""
    left: bool = False
    """Whether its run is at its end, after which programs end in many ways, or its process says that it ends."""


class Hub:
    """Listens on a free port, for connections that know the token."""

    def __init__(self, world_size: int) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world_size)
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._peers = {rank: Peer() for rank in range(world_size)}
        self._connections: dict[int, socket.socket] = {}
        self._number = 0  # the highest number of a run whose end is explained
        self._reason = ""
        self._in_thread(self._accept)

    def hear(self, rank: int, kind: str, *values: Any) -> None:
        """What a process says: "at" step, phase; "failed" error; "lost" error; "bye"."""
        with self._lock:
            self._hear(rank, kind, *values)

    def close(self) -> None:
        """Rank 0 ends by itself: the others go on without a hub."""
        with self._lock:
            self._broadcast("bye")

    def drop(self) -> None:
        """In a forked child: close the copies of the connections."""
        for connection in (self._server, *self._connections.values()):
            os.close(connection.detach())

    def _in_thread(self, target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name="lifeline-hub", daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._in_thread(self._serve, self._server.accept()[0])

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            token, rank = json.loads(lines.readline(100))
            if token != self.token:
                return
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            with self._lock:
                self._connections[rank] = connection
                if self._number:  # a process may fail before the others are here
                    connection.sendall(encoded(("end", self._number, self._reason)))
            with suppress(OSError):  # a process that is killed may reset its connection
                for line in lines:
                    self.hear(rank, *json.loads(line))
            with self._lock:
                del self._connections[rank]
                peer = self._peers[rank]
                if not (peer.left or peer.ended):
                    self._explain(peer.ends + 1, f"{self._name(rank)} was killed or crashed in {peer.at}.")

    def _hear(self, rank: int, kind: str, *values: Any) -> None:
        peer = self._peers[rank]
        if kind == "at":
            peer.at, peer.since, peer.ended = place(*values), time.monotonic(), False
            peer.left = values[1] == "end"
            if rank == 0:  # the others hear it in case rank 0, and with it the hub, is killed
                self._broadcast("at", *values)
        elif kind == "bye":
            peer.left = True
        else:
            peer.ends += 1
            peer.ended = True
            if kind == "failed":
                self._explain(peer.ends, f"{self._name(rank)} failed in {peer.at}: {values[0]}")
            elif peer.ends > self._number:
                self._in_thread(self._find, peer.ends, values[0])

    def _find(self, number: int, error: str) -> None:
        """Explain why processes have lost others, if nobody says so in the meantime."""
        time.sleep(DIAGNOSIS_S)
        with self._lock:
            absent = {rank: peer for rank, peer in self._peers.items() if peer.ends < number}
            told = [f"{self._name(rank)} {_absence(peer)}" for rank, peer in absent.items()]
            self._explain(number, " ".join(told) or f"All processes lost one another ({error}): look at the network.")

    def _explain(self, number: int, reason: str) -> None:
        if number > self._number:
            self._number, self._reason = number, reason
            self._broadcast("end", number, reason)

    def _broadcast(self, *message: Any) -> None:
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(encoded(message))

    def _name(self, rank: int) -> str:
        return f"Rank {rank} of {len(self._peers)}"


def _absence(peer: Peer) -> str:
    if peer.left:
        return f"ended its process in {peer.at}, amid the run."
    return (
        f"has been in {peer.at}, for {time.monotonic() - peer.since:.0f} s, and the others waited for it longer than "
        "collective_timeout_s: look at what it does there, or raise that setting."
    )
