"""A run's output directory: its lock, its checkpoints, and which one to resume from.

    OUTPUT_DIR/RUN.json                  marks the directory as that of a run of this toolkit
              /.lock                     locked while a process trains here
              /metrics.jsonl, times.jsonl
              /checkpoints/step-000123/  see checkpoint.py

A checkpoint is written under a temporary name and renamed into place. So whenever a process is killed, `latest` finds
an intact checkpoint: the previous one or the new one.
"""

import fcntl
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, TrainingError
from rlhf.runs.checkpoint import (
    MANIFEST,
    STEP_NAME,
    Checkpoint,
    DamagedCheckpoint,
    Described,
    described,
    discard,
    read_checkpoint,
    seal,
    set_aside,
    step_name,
    write_files,
)
from rlhf.runs.files import beside, disk_errors, fsync, still_at, write_whole
from rlhf.runs.jsonlines import COMPLETIONS_FILE, METRICS_FILE, TIMES_FILE
from rlhf.runs.shards import Stored, is_sharded, write_shards

RUN_FILE = "RUN.json"
RUN_NAMES = ("checkpoints", METRICS_FILE, TIMES_FILE, COMPLETIONS_FILE)
"""Files and folders that a run writes in its directory. They must not exist before, unless a former run wrote them."""
FILE_SUFFIXES = (".json", ".jsonl", ".safetensors")
_RUN_MARK = b'{"format": "rlhf-toolkit run", "version": 1}\n'


_OPEN: weakref.WeakSet["RunDirectory"] = weakref.WeakSet()


def _leave_locks() -> None:
    """In a forked child process (of a reward function, for example), close the lock file: otherwise the child would keep
    the directory locked after the run ends."""
    for directory in list(_OPEN):
        directory.close()


os.register_at_fork(after_in_child=_leave_locks)


class RunDirectory:
    """One run's output directory. Every process creates one, calls `open` and `save`; only the main process writes."""

    def __init__(
        self,
        path: str | Path,
        *,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        gather: Callable[[list[Any]], list[Any]] = lambda items: items,
        rank: int = 0,
        processes: int = 1,
        keep: int | None = 2,
        others: Sequence[str] = (),
    ) -> None:
        """
        Args:
            path: the output directory.
            is_main: whether this process writes.
            barrier: waits for all processes.
            gather: the lists of all processes, joined.
            rank, processes: this process's number, and how many there are.
            keep: number of newest checkpoints to keep; None keeps all.
            others: names of further files and folders that the run writes, treated like `RUN_NAMES`; files are those that
                end like one of `FILE_SUFFIXES`.
        """
        self.names = (*RUN_NAMES, *others)
        if keep is not None and keep < 1:
            raise InputError(f"The number of checkpoints to keep must be at least 1 (or null for all), got {keep}.")
        self.path = Path(path).absolute()  # user code may change the working directory
        self.checkpoints = self.path / "checkpoints"
        self.is_main = is_main
        self.barrier = barrier
        self.gather = gather
        self.rank = rank
        self.processes = processes
        self.keep = keep
        self._lock: int | None = None
        self._starts_over = False
        self._discarded: list[Path] = []
        self._damaged: list[Path] = []

    def __del__(self) -> None:
        self.close()

    def open(self, resume: bool | str | os.PathLike[str] = False, overwrite: bool = False) -> Checkpoint | None:
        """`claim`, then `clear`."""
        checkpoint = self.claim(resume, overwrite)
        self.clear()
        return checkpoint

    def claim(
        self,
        resume: bool | str | os.PathLike[str] = False,
        overwrite: bool = False,
        *,
        accept: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> Checkpoint | None:
        """Lock the directory. Returns the checkpoint to continue from; None: start at step 0. All processes call it.

        resume: True for the newest good checkpoint here (None if the run died before its first), or the path of a
        checkpoint or a run. overwrite: `clear` deletes the files of a former run here. accept: called with the checkpoint;
        raises InputError if it is of another run.
        Raises InputError, without changing any of the user's files, if the directory cannot be used that way.
        """
        if not isinstance(resume, bool | str | os.PathLike):
            raise InputError(f"resume={resume!r}: give True, False, or the path of a checkpoint or a run.")
        resume = resume if isinstance(resume, bool) else os.fspath(resume)
        if isinstance(resume, str) and Path(resume).resolve() == self.path.resolve():
            resume = True
        try:
            with disk_errors(f"{self._where} cannot be used", "Fix it, or choose another one.", kind=InputError):
                checkpoint = self.load(resume) if isinstance(resume, str) else None
                if checkpoint is not None:
                    accept(checkpoint)
                if self.is_main:
                    self._claim(resume, overwrite)
                self.barrier()
                if resume is True and (checkpoint := self.latest()) is not None:
                    accept(checkpoint)
                start = checkpoint.step if checkpoint else -1
                later = [path for step, path in self._steps().items() if step > start]
            if later and isinstance(resume, str) and not overwrite:
                raise InputError(
                    f"resume={resume!r} would discard {[path.name for path in later]}. Resume from the newest, choose "
                    "another output_dir, or add overwrite."
                )
            self.barrier()
        except BaseException:
            self.close()
            raise
        self._discarded = [] if resume is True else later
        self._damaged = later if resume is True else []
        return checkpoint

    def clear(self) -> None:
        """Delete what the run that begins or goes on now replaces, as `claim` was told. All processes call it."""
        if self.is_main and self._lock is not None:
            try:
                with disk_errors(f"{self._where} cannot be cleared", "Fix it, then start again.", kind=InputError):
                    self._clear()
            except BaseException:
                self.close()
                raise
        self._starts_over = False
        self._discarded = []
        self._damaged = []
        self.barrier()

    def _clear(self) -> None:
        if self._starts_over:
            for path in self._steps().values():  # oldest first: if killed here, the newest checkpoint remains
                discard(path)
            for name in self.names[1:]:
                path = self.path / name
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        else:
            for path in self._discarded:
                discard(path)
        for path in self._damaged:
            set_aside(path)  # kept as evidence
        for path in self.checkpoints.glob("step-*.tmp"):
            if STEP_NAME.fullmatch(path.stem) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        fsync(self.path)

    def close(self) -> None:
        """Release the lock. The end of the process releases it too."""
        lock = getattr(self, "_lock", None)
        if lock is not None:
            os.close(lock)
            self._lock = None

    @property
    def _where(self) -> str:
        return f"output_dir={str(self.path)!r}"

    def _claim(self, resume: bool | str, overwrite: bool) -> None:
        where = self._where
        if resume is True and overwrite:
            raise InputError("resume continues the run and overwrite deletes it: give only one of the two.")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{where} is a file. Give a directory.")
        mark = self.path / RUN_FILE
        ours = mark.is_file() and mark.read_bytes() == _RUN_MARK
        foreign = [name for name in (RUN_FILE, *self.names) if os.path.lexists(self.path / name)]
        if foreign and not ours:
            raise InputError(f"{where} holds {foreign}, which no run of this toolkit wrote. Choose another output_dir.")
        if resume is True and not ours:
            raise InputError(f"{where} holds no run to resume. Check the path, or start without resume.")
        for path in (self.path / name for name in self.names):
            if os.path.lexists(path) and _kind(path) != _wanted(path):
                raise InputError(
                    f"{path} is a {_kind(path)}, where a run has a {_wanted(path)} of its own. Move it away, then start "
                    "again."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock(where)
        inside = isinstance(resume, str) and self.checkpoints.resolve() in Path(resume).resolve().parents
        written = [file for name in self.names if (file := self.path / name).is_file()]
        begun = bool(self._steps()) or any(file.stat().st_size for file in written)
        if begun and not (resume is True or inside or overwrite):
            raise InputError(
                f"{where} already holds a run. Continue it with resume, choose another output_dir, or replace it with "
                "overwrite."
            )
        self._starts_over = overwrite and not inside
        if not ours:
            write_whole(mark, _RUN_MARK)
        self.checkpoints.mkdir(exist_ok=True)
        fsync(self.path)

    def _take_lock(self, where: str) -> None:
        self.close()
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{where} is in use by another process. Stop it, or choose another output_dir.") from error
        _OPEN.add(self)

    def _come_back(self) -> None:
        """Make the directory again if it was removed during the run, for what is trained. Raises TrainingError if another
        one lies in its place, which may be another run's."""
        assert self._lock is not None, "open the run directory first"
        lock = self.path / ".lock"
        if not still_at(self._lock, lock):
            if os.path.lexists(lock):
                raise TrainingError(
                    f"{self.path} is no longer the directory of this run: it was replaced during the run, and nothing is "
                    "written into the new one. Put the run's own directory back, then resume."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock(self._where)
            write_whole(self.path / RUN_FILE, _RUN_MARK)
        if not self.checkpoints.is_dir():
            if os.path.lexists(self.checkpoints):
                raise TrainingError(
                    f"{self.checkpoints} is a {_kind(self.checkpoints)} now. Move it away, then resume."
                )
            warnings.warn(f"{self.checkpoints} was removed during the run, and is made again", stacklevel=4)
            self.checkpoints.mkdir()

    def _steps(self) -> dict[int, Path]:
        """Step -> checkpoint directory, oldest first. Ignores other names (`best`, `step-11.tmp`) and links."""
        entries = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        matches = [
            (STEP_NAME.fullmatch(path.name), path) for path in entries if path.is_dir() and not path.is_symlink()
        ]
        steps = {int(match[1]): path for match, path in matches if match and path.name == step_name(int(match[1]))}
        return dict(sorted(steps.items()))

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None if there are no checkpoints. Warns of newer ones that are damaged.

        Raises InputError if all are damaged.
        """
        problems = []
        for path in reversed(self._steps().values()):
            try:
                checkpoint = read_checkpoint(path)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                continue
            if problems and self.is_main:
                warnings.warn(f"Falling back to {path.name}: {'; '.join(problems)}", stacklevel=2)
            return checkpoint
        if problems:
            raise InputError(
                f"All checkpoints in {self.checkpoints} are damaged: {'; '.join(problems)}. Start over with overwrite."
            )
        return None

    def load(self, which: str | Path | int | None = None) -> Checkpoint:
        """The checkpoint of a step (int) or at a path (its directory, or a run's); None: the newest intact one here."""
        path = self.checkpoints / step_name(which) if isinstance(which, int) else Path(which or self.path).resolve()
        if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
            return read_checkpoint(path)
        checkpoint = RunDirectory(path, is_main=self.is_main).latest()
        if checkpoint is None:
            raise InputError(f"{path} holds no checkpoint. Give a checkpoint's directory or a run's output_dir.")
        return checkpoint

    def save(
        self,
        step: int,
        tensors: Mapping[str, Stored],
        state: Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and flush it to disk before returning. All processes call it.

        tensors: group -> name -> tensor, one file per group, or this process's `Shard`, one file per
        process. state: must survive a round trip through JSON. config:
        stored in the manifest, for `check_resumable`.
        Raises TrainingError naming the path (disk full, ...); earlier checkpoints stay untouched.
        """
        final = self.checkpoints / step_name(step)
        temporary = final.with_name(f"{final.name}.tmp")
        text = json.dumps(state, sort_keys=True, indent=1)
        if json.loads(text) != state:
            raise TrainingError(f"The state of step {step} does not survive a round trip through JSON: {text[:200]}")
        shared = {group: named for group, named in tensors.items() if self.processes > 1 and is_sharded(named)}
        whole = {group: named for group, named in tensors.items() if group not in shared}
        try:
            self._together(final, lambda: self._begin(final, step, whole, text))
            if self.gather([bool(shared)])[0]:
                written = self._together(final, lambda: self._write_shards(temporary, shared))
                known = {name: entry for files in written for name, entry in files.items()}
            else:
                known = {}
            self._together(final, lambda: self._end(final, step, config or {}, known))
        except TrainingError:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # free space on a full disk
            raise
        if self.is_main:
            self._prune()
        self.barrier()
        return final

    def _begin(self, final: Path, step: int, tensors: Mapping[str, Any], text: str) -> None:
        if self.is_main:
            self._come_back()
            if final.exists():
                raise FileExistsError("a checkpoint of this step already exists")
            write_files(beside(final), step, tensors, text)

    def _write_shards(self, folder: Path, groups: Mapping[str, Stored]) -> Described:
        files = [write_shards(folder, group, named, self.rank, self.processes) for group, named in groups.items()]
        for file in files:
            fsync(file)
        return {name: entry for file in files for name, entry in described(file).items()}

    def _end(self, final: Path, step: int, config: Mapping[str, Any], known: Described) -> None:
        """Name every file in the manifest and rename the folder: from then on there is a checkpoint."""
        if self.is_main:
            temporary = final.with_name(f"{final.name}.tmp")
            seal(temporary, step, config, known)
            os.rename(temporary, final)
            fsync(self.checkpoints)

    def _together(self, final: Path, work: Callable[[], Any]) -> list[Any]:
        """Do this process's share, and return what all processes did. If one fails, all raise its TrainingError."""
        remedy = "Earlier ones are whole: free disk space or fix the path, then resume."
        result: Any = None
        failure: TrainingError | None = None
        try:
            with disk_errors(f"The checkpoint {final} was not written", remedy):
                result = work()
        except TrainingError as error:
            failure = error
        outcomes = self.gather([(result, None if failure is None else str(failure))])
        failed = [message for _, message in outcomes if message is not None]
        if failed:
            raise failure or TrainingError(failed[0])
        return [outcome for outcome, _ in outcomes]

    def _prune(self) -> None:
        """Delete all but the newest checkpoints. A failure costs only disk space, so it does not stop the run."""
        for path in list(self._steps().values())[: -self.keep] if self.keep else ():
            try:
                discard(path)
            except OSError as error:
                warnings.warn(f"The old checkpoint {path} was not deleted: {error}", stacklevel=3)


def _wanted(path: Path) -> str:
    """What a run writes at this path of its directory."""
    return "file" if path.suffix in FILE_SUFFIXES else "folder"


def _kind(path: Path) -> str:
    """What lies at the path."""
    return "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
