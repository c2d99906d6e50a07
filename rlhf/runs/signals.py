"""Delays Ctrl-C and SIGTERM to the end of a step, since a run is in a consistent state only between two steps."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf.runs.reporting import Unheard

SAME_SIGNAL_S = 0.5
"""Signals this close together count as one: a launcher repeats the signal that the terminal already sent to all."""


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ends a run. number: the signal's number."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class Signals:
    """Records the first signal that arrives, if any."""

    number: int | None = None
    _at: float = 0.0

    def __init__(self) -> None:
        alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
        self._launcher = os.getppid() if alone else None

    def heed_launcher(self) -> None:
        """Takes the end of an `accelerate launch` of one process for SIGTERM, which that does not pass on."""
        if self.number is None and self._launcher not in (None, os.getppid()):
            self.note(signal.SIGTERM, None)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: records the first signal; the second one interrupts at once."""
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"rlhf: {name}: the run ends after this step. A second one ends it at once."
            print(text, file=Unheard(sys.stderr), flush=True)
        elif time.monotonic() - self._at > SAME_SIGNAL_S:
            raise Interrupted(number)


@contextmanager
def waiting_signals() -> Iterator[Signals]:
    """Delay SIGINT and SIGTERM inside the block. Does nothing outside the main thread, which alone receives signals."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a process that has lost the others does
                signal.signal(number, handler)
