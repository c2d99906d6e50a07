"""The JSON Lines files of a run: metrics.jsonl, times.jsonl and completions.jsonl."""

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.runs.files import disk_errors, still_at

METRICS_FILE, TIMES_FILE, COMPLETIONS_FILE = "metrics.jsonl", "times.jsonl", "completions.jsonl"


class JsonLines:
    """A file of JSON objects, one per line, each with its "step". A resumed run continues it byte for byte."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._errors("opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line, with sorted keys and full precision, and hand it to the operating system (no fsync).

        Raises TrainingError if the disk refuses it, or the file is no longer at its path.
        """
        line = encoded(step, record)
        with self._errors(f"written at step {step}"):
            self._file.write(line)
            self._file.flush()
            self._check_place()

    def sync(self) -> None:
        """Flush to disk. Call it before the checkpoint of the step is written. Raises TrainingError like `write`."""
        with self._errors("flushed to disk"):
            self._check_place()
            os.fsync(self._file.fileno())

    def truncate_to(self, step: int) -> None:
        """Delete every line later than `step` (-1: all lines); a resumed run writes them again, byte for byte.

        An incomplete last line (killed while writing) is deleted too. Raises InputError, without changing the file, if
        a line that must stay cannot be read.
        """
        with self._errors("cut to the steps that are saved"):
            self._file.truncate(_end_of_step(self.path, step))
        self.sync()

    def close(self) -> None:
        with suppress(OSError):  # it can only repeat a write that has failed, and was reported
            self._file.close()

    def _check_place(self) -> None:
        if not still_at(self._file.fileno(), self.path):
            raise FileNotFoundError(errno.ENOENT, "it was removed or replaced during the run", str(self.path))

    def _errors(self, done: str) -> AbstractContextManager[None]:
        return disk_errors(f"{self.path} cannot be {done}")


def encoded(step: int, record: Mapping[str, Any]) -> bytes:
    """`record` and its step as a line. What JSON lacks is written as text: the prompts of a data set may hold it."""
    return json.dumps({**record, "step": step}, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n"


class MetricsWriter:
    """Appends to metrics.jsonl and times.jsonl of a run. Only one process of the run creates one."""

    def __init__(self, directory: str | Path) -> None:
        self._metrics = JsonLines(Path(directory) / METRICS_FILE)
        self._times = JsonLines(Path(directory) / TIMES_FILE)

    def write(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float] | None = None) -> None:
        """Write one line to each file. NaN and infinity become null, since JSON has neither."""
        self._metrics.write(step, {name: number(value) for name, value in metrics.items()})
        if times is not None:
            self._times.write(step, {name: number(value) for name, value in times.items()})

    def sync(self) -> None:
        self._metrics.sync()
        self._times.sync()

    def truncate_to(self, step: int) -> None:
        """See JsonLines. Neither file is changed if one of them cannot be cut."""
        for file in (self._metrics, self._times):
            with disk_errors(f"{file.path} cannot be read"):
                _end_of_step(file.path, step)
        self._metrics.truncate_to(step)
        self._times.truncate_to(step)

    def close(self) -> None:
        self._metrics.close()
        self._times.close()


def number(value: float) -> float | int | None:
    """A metric as JSON holds it; NaN and infinity become null."""
    if isinstance(value, int):
        return value
    if isinstance(value, str | bytes):
        raise TypeError("it is text")  # which float() would read
    value = float(value)  # also numpy scalars and 0-d tensors
    return value if math.isfinite(value) else None


def _step_of(line: bytes) -> int | None:
    """The step of a line, or None if the line is incomplete or unreadable."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _end_of_step(path: Path, last_step: int) -> int:
    """Size in bytes of the leading lines whose step is at most `last_step`."""
    steps_and_sizes = [(_step_of(line), len(line)) for line in path.read_bytes().splitlines(keepends=True)]
    end, count = 0, 0
    for step, size in steps_and_sizes:
        if step is None or step > last_step:
            break
        end, count = end + size, count + 1
    if any(step is not None and step <= last_step for step, _ in steps_and_sizes[count:]):
        raise InputError(
            f"{path}: line {count + 1} is damaged or out of order, and later lines of steps up to {last_step} would be "
            "lost. Repair or delete that line, then resume."
        )
    return end


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, given by its path or its run directory. An incomplete last line is left out."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a run's output directory or its {METRICS_FILE}.")
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if _step_of(line) is None and number < len(lines):
            raise InputError(f"{path}: line {number} is not a metrics line: {line[:60]!r}. Repair or delete it.")
    return [json.loads(line) for line in lines if _step_of(line) is not None]
