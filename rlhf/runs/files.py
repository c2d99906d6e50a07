"""Files and folders that are whole or absent: written beside their place, flushed, and renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(final: Path) -> Path:
    """Where the content of `final` is written first; what an earlier attempt left there is deleted."""
    temporary = final.with_name(f"{final.name}.tmp")
    if temporary.is_file():
        temporary.unlink()
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def put_in_place(temporary: Path, final: Path) -> None:
    """Flush what was written at `temporary` and let it take the place of `final`."""
    if temporary.is_dir():
        flush_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)
    else:
        fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


@contextmanager
def written_beside(final: Path) -> Iterator[Path]:
    """The folder or file to write in the place of `final`, which takes it at the end, unless an error is raised."""
    temporary = beside(final)
    yield temporary
    put_in_place(temporary, final)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as temporary:
        temporary.write_bytes(data)


def flush_directory(path: Path) -> None:
    """Put the files of `path` on the disk, readable as the umask says: safetensors makes them private (0600)."""
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
