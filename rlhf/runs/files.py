"""Files and folders that are complete or absent: written under a temporary name, flushed, and renamed into place.

And the one place that turns errors of the disk into ours: `disk_errors`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rlhf.errors import InputError, TrainingError

FREE_OR_FIX = "Free disk space or fix the path, then resume."


@contextmanager
def disk_errors(
    failed: str,
    remedy: str = FREE_OR_FIX,
    *,
    kind: type[Exception] = TrainingError,
    also: type[Exception] = SafetensorError,
) -> Iterator[None]:
    """Raises an error of the disk inside the block as `kind`: "FAILED: the error. REMEDY". Our own errors pass unchanged.

    failed: what failed, with its path. also: what libraries raise in place of an OSError.
    """
    try:
        yield
    except (InputError, TrainingError):
        raise
    except (OSError, also) as error:
        raise kind(f"{failed}: {error}. {remedy}") from error


def still_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: what is written to one that was removed or replaced is lost."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def beside(final: Path) -> Path:
    """Temporary path next to `final`, to write to first. Deletes what an earlier attempt left there."""
    temporary = final.with_name(f"{final.name}.tmp")
    delete(temporary)
    return temporary


def delete(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder, if there is one; what cannot be deleted stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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
    """Gives a temporary path to write to; at the end it is renamed to `final`. After an error it is deleted."""
    temporary = beside(final)
    try:
        yield temporary
        put_in_place(temporary, final)
    except BaseException:
        with suppress(OSError):
            delete(temporary)  # free space on a full disk
        raise


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
