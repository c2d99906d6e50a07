"""A run's output directory: its lock, its checkpoints (written beside and renamed into place), and which one to resume.

    OUTPUT_DIR/RUN.json                  says that the directory belongs to a run of this toolkit
              /.lock                     locked while a process trains here
              /metrics.jsonl, times.jsonl
              /checkpoints/step-000123/  see checkpoint.py

A process may be killed anywhere: what `latest` finds then is the checkpoint before or the one after, whole.
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

from safetensors import SafetensorError
from torch import Tensor

from rlhf.errors import InputError, TrainingError
from rlhf.runs.checkpoint import (
    MANIFEST,
    STEP_NAME,
    Checkpoint,
    DamagedCheckpoint,
    discard,
    read_checkpoint,
    seal,
    set_aside,
    step_name,
    write_file,
    write_files,
)
from rlhf.runs.files import beside, fsync
from rlhf.runs.jsonlines import COMPLETIONS_FILE, METRICS_FILE, TIMES_FILE

RUN_FILE = "RUN.json"
RUN_NAMES = ("checkpoints", METRICS_FILE, TIMES_FILE, COMPLETIONS_FILE)
"""What a run writes in its directory: must not be there before it, unless a run of ours wrote them."""
_RUN_MARK = b'{"format": "rlhf-toolkit run", "version": 1}\n'


_OPEN: weakref.WeakSet["RunDirectory"] = weakref.WeakSet()


def _leave_locks() -> None:
    """A forked copy of this process (a reward function's, say) does not keep the run's directory locked after its end."""
    for directory in list(_OPEN):
        directory.close()


os.register_at_fork(after_in_child=_leave_locks)


class RunDirectory:
    """One run's output directory. Every process makes one and calls `open` and `save`; only the main one writes."""

    def __init__(
        self,
        path: str | Path,
        *,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        keep: int | None = 2,
        others: Sequence[str] = (),
    ) -> None:
        """barrier: waits for all processes. keep: how many of the newest checkpoints stay; None: all. others: names of
        files and folders that the run writes besides `RUN_NAMES`, and that belong to it alike."""
        self.names = (*RUN_NAMES, *others)
        if keep is not None and keep < 1:
            raise InputError(f"The number of checkpoints to keep must be at least 1 (or null for all), got {keep}.")
        self.path, self.checkpoints = Path(path), Path(path) / "checkpoints"
        self.is_main, self.barrier, self.keep = is_main, barrier, keep
        self._lock: int | None = None

    def open(self, resume: bool | str = False, overwrite: bool = False) -> Checkpoint | None:
        """Claim the directory; the checkpoint to continue from, or None to start at step 0. All processes call it.

        resume: True for the newest good checkpoint here (None if the run died before its first), or the path of a
        checkpoint or run. overwrite: delete what a former run of ours left here.
        Raises InputError, with nothing of the user's changed, if the directory cannot be used that way.
        """
        if isinstance(resume, str) and Path(resume).resolve() == self.path.resolve():
            resume = True
        try:
            if self.is_main:
                self._claim(resume, overwrite)
            self.barrier()
            checkpoint = None
            if resume:
                checkpoint = self.latest() if resume is True else self.load(resume)
            start = checkpoint.step if checkpoint else -1
            later = [path for step, path in self._steps().items() if step > start]
            if later and isinstance(resume, str) and not overwrite:
                raise InputError(
                    f"resume={resume!r} would discard {[path.name for path in later]}. Resume from the newest, choose "
                    "another output_dir, or add overwrite."
                )
            self.barrier()
            for path in later if self.is_main else ():
                discard(path) if isinstance(resume, str) else set_aside(path)  # the latter are damaged: evidence
            self.barrier()
        except OSError as error:
            self.close()
            raise InputError(f"output_dir={str(self.path)!r} cannot be used: {error}. Choose another one.") from error
        except InputError:
            self.close()
            raise
        return checkpoint

    def close(self) -> None:
        """Give the lock back; the end of the process does it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self, resume: bool | str, overwrite: bool) -> None:
        where = f"output_dir={str(self.path)!r}"
        if resume is True and overwrite:
            raise InputError("resume continues the run and overwrite deletes it: give only one of the two.")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{where} is a file. Give a directory.")
        mark = self.path / RUN_FILE
        ours = mark.is_file() and mark.read_bytes() == _RUN_MARK
        foreign = [name for name in self.names if os.path.lexists(self.path / name)]
        if foreign and not ours:
            raise InputError(f"{where} holds {foreign}, which no run of this toolkit wrote. Choose another output_dir.")
        if resume is True and not ours:
            raise InputError(f"{where} holds no run to resume. Check the path, or start without resume.")
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
        if overwrite and isinstance(resume, str):
            self.load(resume)  # a bad path must fail before anything is deleted
        if overwrite and not inside:
            for path in self._steps().values():  # oldest first: if killed here, what is left is still a whole run
                discard(path)
            for file in written:
                file.unlink()
            for name in self.names[1:]:
                shutil.rmtree(self.path / name, ignore_errors=True)
        if not ours:
            write_file(mark, _RUN_MARK)
        self.checkpoints.mkdir(exist_ok=True)
        for path in self.checkpoints.glob("step-*.tmp"):
            if STEP_NAME.fullmatch(path.stem) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        fsync(self.path)

    def _take_lock(self, where: str) -> None:
        self.close()
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{where} is in use by another process. Stop it, or choose another output_dir.") from error
        _OPEN.add(self)

    def _steps(self) -> dict[int, Path]:
        """Step -> directory, oldest first. Other names (`best`, `step-11.tmp`) and links are no checkpoints."""
        entries = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        matches = [
            (STEP_NAME.fullmatch(path.name), path) for path in entries if path.is_dir() and not path.is_symlink()
        ]
        steps = {int(match[1]): path for match, path in matches if match and path.name == step_name(int(match[1]))}
        return dict(sorted(steps.items()))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, with a warning for each newer one that does not; None if there are none.

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
                f"No checkpoint in {self.checkpoints} is good: {'; '.join(problems)}. Start anew with overwrite."
            )
        return None

    def load(self, which: str | Path | int | None = None) -> Checkpoint:
        """The checkpoint of a step, or at a path (its own directory or a run's); None: the newest good one."""
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
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`; it exists, whole and on the disk, when this returns. All processes call it.

        tensors: group -> name -> tensor, one file per group. state: what JSON gives back unchanged. config: kept in the
        manifest, for `check_resumable`.
        Raises TrainingError naming the path (disk full, ...); earlier checkpoints are untouched.
        """
        final = self.checkpoints / step_name(step)
        temporary = final.with_name(f"{final.name}.tmp")
        text = json.dumps(state, sort_keys=True, indent=1)
        if json.loads(text) != state:
            raise TrainingError(f"The state of step {step} would not come back from JSON as it is: {text[:200]}")
        try:
            if self.is_main:
                assert self._lock is not None, "open the run directory first"
                if final.exists():
                    raise FileExistsError("there is one of this step already")
                write_files(beside(final), step, tensors, text)
                seal(temporary, step, config or {})
            self.barrier()
            if self.is_main:
                os.rename(temporary, final)
                fsync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # gives a full disk its space back
            raise TrainingError(
                f"The checkpoint {final} was not written: {error}. Earlier ones are whole: free space or correct the "
                "path, then resume."
            ) from error
        if self.is_main:
            self._prune()
        self.barrier()
        return final

    def _prune(self) -> None:
        """Delete all but the newest checkpoints; a failure costs disk space only, so it does not stop the run."""
        for path in list(self._steps().values())[: -self.keep] if self.keep else ():
            try:
                discard(path)
            except OSError as error:
                warnings.warn(f"The old checkpoint {path} was not deleted: {error}", stacklevel=3)
