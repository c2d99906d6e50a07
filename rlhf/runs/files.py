"""Files and folders that are complete or absent: written under a temporary name, flushed, and renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(final: Path) -> Path:
    """Temporary path next to `final`, to write to first. Deletes what an earlier attempt left there."""
    temporary = final.with_name(f"{final.name}.tmp")
    if temporary.is_file():
        temporary.unlink()
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def put_in_place(temporary: Path, final: Path) -> None:
    """Flush `temporary` to disk and rename it to `final`, which it replaces."""
    if temporary.is_dir():
        flush_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)
    else:
        fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


@contextmanager
def written_beside(final: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; at the end it is renamed to `final`, unless an error was raised."""
    temporary = beside(final)
    yield temporary
    put_in_place(temporary, final)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: if interrupted, the old content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as temporary:
        temporary.write_bytes(data)


def flush_directory(path: Path) -> None:
    """Flush the files of `path` to disk, with permissions by the umask: safetensors makes its files private (0600)."""
    mode = path.stat().st_mode & 0o666  # mkdir applied the umask
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.is_symlink():
            os.chmod(file, mode)
            fsync(file)
    fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
