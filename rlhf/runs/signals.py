"""Ctrl-C and SIGTERM at a moment when nothing is lost: a run belongs together only between two steps."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_SIGNAL_S = 0.5
"""Signals this close together are one: a launcher passes on what the terminal has sent to every process already."""


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended after it had finished its step. `number`: the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class Signals:
    """Which signal came while they waited, if one did."""

    number: int | None = None
    _at: float = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal is remembered, the second one interrupts at once."""
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            print(
                f"rlhf: {name}: the run ends after this step. A second one ends it at once.",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - self._at > SAME_SIGNAL_S:
            raise Interrupted(number)


@contextmanager
def waiting_signals() -> Iterator[Signals]:
    """Within, SIGINT and SIGTERM wait. Only a program's main thread gets signals; in others nothing is changed."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
