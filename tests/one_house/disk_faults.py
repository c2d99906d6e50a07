"""Lets the disk refuse one call of a real run: any by which it opens for writing, writes, flushes, renames or deletes.

Python announces these calls, whoever makes them (PEP 578); flushing, and the files that Rust writes, are wrapped.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils

import rlhf.models.adapters
import rlhf.models.critic
import rlhf.runs.shards

CODES = {code: getattr(errno, code) for code in ("ENOSPC", "EIO", "EACCES")}
_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Refusing:
    """Counts the calls on files below `folder`, and refuses number `at` with the error `code`."""

    def __init__(self, folder: Path, at: int | None = None, code: str = "ENOSPC") -> None:
        self.folder, self.at, self.code = str(folder), at, code
        self.calls: list[str] = []

    def touch(self, call: str, path: Any) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.calls.append(f"{call} {Path(path).relative_to(self.folder)}")
        if len(self.calls) - 1 == self.at:
            raise OSError(CODES[self.code], os.strerror(CODES[self.code]), os.fspath(path))


_now: Refusing | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _now is None:
        return
    if event in _EVENTS:
        _now.touch(event.removeprefix("os."), arguments[0])
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        _now.touch("open", arguments[0])


sys.addaudithook(_hook)  # for good: Python has no way to remove one


@contextmanager
def refusing(folder: Path, at: int | None = None, code: str = "ENOSPC") -> Iterator[Refusing]:
    """The block runs with a disk that refuses call number `at` below `folder`; None: only counts."""
    global _now
    disk = Refusing(folder, at, code)
    fsync = os.fsync

    def flushed(descriptor: int) -> None:
        disk.touch("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def writes(save: Any) -> Any:
        def saved(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            disk.touch("write", path)
            return save(tensors, path, *args, **kwargs)

        return saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", flushed)
        for module, name in (
            (rlhf.runs.shards, "save_file"),
            (rlhf.models.adapters, "save_file"),
            (rlhf.models.critic, "save_file"),
            (transformers.modeling_utils, "safe_save_file"),
        ):
            patch.setattr(module, name, writes(getattr(module, name)))
        _now = disk
        try:
            yield disk
        finally:
            _now = None
