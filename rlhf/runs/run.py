"""One run: its directory, logs, tracker, callbacks, signals and checkpoints, and how it resumes.

    run = Run(output_dir, distributed, description=settings, must_match={"seed"}, callbacks=[...])
    run.open(resume=True)                                        # claims the directory
    run.restore({"learner": learner, "source": source})          # from the checkpoint, if there is one
    with run.training():
        while run.step < total_steps and not run.stopping():
            ...                                                  # collect, learn
            run.log(metrics, samples)                            # ends the step: run.step grows by one
            run.save()                                           # every few steps
        run.finish()

Language models and control tasks both use this class; each saves its own named parts.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf import lifeline
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError, excerpt
from rlhf.runs.callbacks import Callback
from rlhf.runs.checkpoint import ANOTHER, Checkpoint, Part, Saved
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import disk_errors
from rlhf.runs.jsonlines import COMPLETIONS_FILE, JsonLines, MetricsWriter
from rlhf.runs.metrics import unknown_names
from rlhf.runs.reporting import Display, say
from rlhf.runs.resume import check_resumable
from rlhf.runs.signals import Interrupted, Signals, waiting_signals
from rlhf.settings import dotted


class Run:
    """One training run. Every process creates one; only the main process writes. `output_dir` None: write nothing."""

    def __init__(
        self,
        output_dir: str | Path | None,
        distributed: Distributed,
        *,
        description: Mapping[str, Any],
        must_match: set[str],
        keep_checkpoints: int | None = None,
        callbacks: Sequence[Callback] = (),
        writes: Sequence[str] = (),
        tracker: str = "rlhf",
    ) -> None:
        """
        Args:
            output_dir: the run's directory, or None.
            distributed: the process group.
            description: settings and fingerprints, stored in checkpoints.
            must_match: names in `description` that must be equal when a run is resumed.
            keep_checkpoints: number of newest checkpoints to keep; None keeps all.
            callbacks: hooks to call during the run.
            writes: names of further files and folders in output_dir that the caller writes.
            tracker: the run's name in the tracker, if `distributed` has one.
        """
        self.distributed = distributed
        self.callbacks = list(callbacks)
        self.description = description
        self.must_match = must_match
        self._tracker = tracker
        self.step = 0
        """Number of completed steps."""
        self.saved_step = 0
        """Number of completed steps in the newest checkpoint."""
        self.should_stop = False
        """Set by a callback to end the run after the current step."""
        self.directory: RunDirectory | None = None
        if output_dir is not None:
            self.directory = RunDirectory(
                output_dir,
                is_main=distributed.is_main,
                barrier=distributed.barrier,
                gather=distributed.gather_objects,
                rank=distributed.rank,
                processes=distributed.world_size,
                keep=keep_checkpoints,
                others=writes,
            )
        self._parts: Mapping[str, Part] = {}
        self._checkpoint: Checkpoint | None = None
        self._signals = Signals()
        self._display = Display()
        self._metrics: MetricsWriter | None = None
        self._samples: JsonLines | None = None
        self._clock = 0.0

    # ---- the beginning ----

    def open(self, *, resume: bool | str = False, overwrite: bool = False) -> None:
        """Claim the directory and find the checkpoint to continue from, if any. All processes call it.

        resume: True for the newest intact checkpoint here, or the path of a checkpoint or a run. overwrite: replace the
        run in the directory. Raises InputError if the directory cannot be used that way, if the checkpoint belongs to a
        run with other settings, or if processes have different ones; the directory is then as before, and unlocked.
        """
        self._require_equal()
        if self.directory is None:
            return
        changed: list[str] = []

        def accept(checkpoint: Checkpoint) -> None:
            changed.extend(check_resumable(checkpoint.config, self.description, must_match=self.must_match))

        checkpoint = self.directory.claim(resume, overwrite, accept=accept)
        if checkpoint is not None:
            self.say(f"resumed from {checkpoint.path}", *[f"changed since: {note}" for note in changed])
        self.step = self.saved_step = checkpoint.step if checkpoint else 0
        self._checkpoint = checkpoint

    def _require_equal(self) -> None:
        """InputError if another process was started with other settings, data or models."""
        mine = {name: value for name, value in dotted(self.description) if name != "output_dir"}
        first, *others = self.distributed.gather_objects([mine])
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise InputError(
                        f"{name}={excerpt(first.get(name))} on process 0, but {excerpt(other.get(name))} on process "
                        f"{rank}. Start all processes with the same settings, data and models."
                    )

    @property
    def resumes(self) -> bool:
        """Whether `open` found a checkpoint, from which `restore` will continue."""
        return self._checkpoint is not None

    def restore(self, parts: Mapping[str, Part]) -> None:
        """Register the parts that `save` saves, by name, load them from the checkpoint that `open` found, if any, and then
        delete what the run replaces.

        Raises InputError, and unlocks the directory, if the checkpoint does not fit the parts, or a part cannot be saved;
        the first part, the learner, is then as before.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        self._parts = parts
        try:
            for name, part in parts.items():
                _check_part(name, part)
            if checkpoint is not None:
                _load(checkpoint, parts)
            if self.directory is not None:
                self.directory.clear()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def training(self, display: Display | None = None) -> Iterator[None]:
        """Context of the training loop. Opens logs and tracker, and delays Ctrl-C and SIGTERM to the end of the step (a
        second signal interrupts at once). If an error ends the loop, saves the completed steps first (one process only).
        With several processes, tells the others of it; raises TrainingError, naming rank, step and phase, if another
        process caused it.
        """
        self.should_stop = False
        lifeline.now(self.step)
        self._display = display or Display()
        try:
            self._open_logs()
            self.say(*self.distributed.notes)
            with waiting_signals() as self._signals:
                try:
                    yield
                except BaseException as error:
                    raise lifeline.report(error, self.saved)  # noqa: B904  it is `error`, or says why it came
            lifeline.now(self.step, "end")
        except BaseException as error:
            try:
                self._rescue()
            except Exception as failure:
                again = str(failure) == str(error)  # it was saving that failed
                error.add_note(f"rlhf: the completed steps could not be saved{'' if again else f': {failure}'}")
            raise
        finally:
            self._close_logs()

    # ---- step by step ----

    def stopping(self) -> bool:
        """Whether to end the run now: a callback on any process asked for it, or a signal came. All processes call this
        and get the same answer."""
        lifeline.now(self.step)
        self._signals.heed_launcher()
        return self._on_any(self.should_stop or self._signals.number is not None)

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """End the step: log metrics, seconds and samples, and update the progress bar and the tracker."""
        unknown = unknown_names(metrics)
        assert not unknown, f"add {unknown} to the table in rlhf/runs/metrics.py"
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        if self._metrics is not None:
            self._metrics.write(self.step, metrics, {"step_s": seconds})
        if samples and self.distributed.is_main:
            self._open_samples()
            for sample in samples:
                self._samples.write(self.step, sample)  # type: ignore[union-attr]
        self._display.show(metrics, seconds)
        at, tracked = self._display.tracked(self.step, metrics, seconds)
        with disk_errors(f"The tracker cannot be written at step {self.step}"):
            self.distributed.track(tracked, at)
        self.step += 1

    def notify(self, hook: str, *arguments: Any) -> None:
        """Call the method `hook` of every callback; each gets its own copy of dictionary arguments."""
        for callback in self.callbacks:
            with lifeline.phase(hook):
                getattr(callback, hook)(*[dict(a) if isinstance(a, dict) else a for a in arguments])

    def save(self) -> None:
        """Write a checkpoint of the completed steps, unless there is one. All processes call it, between two steps."""
        self._sync_logs()
        saved = self._save(self.step)
        assert saved, "save() may only be called between two steps"

    @lifeline.phase("checkpoint")
    def _save(self, step: int) -> bool:
        """Save all parts as they are after `step` steps. Returns False, and saves nothing, if a part is not there."""
        if self.directory is None or self.saved_step == step:
            return True
        states = {name: part.state(step) for name, part in self._parts.items()}
        parts = {name: state for name, state in states.items() if state is not None}
        if len(parts) < len(states):
            return False
        tensors = [group for saved in parts.values() for group in saved.tensors.items()]
        assert len(dict(tensors)) == len(tensors), "two parts save tensors under the same name"
        values = {name: saved.values for name, saved in parts.items()}
        self.directory.save(step, dict(tensors), values, config=self.description)
        self.saved_step = step
        return True

    def finish(self) -> None:
        """Call after the last step. Saves the completed steps; raises Interrupted if a signal ended the loop."""
        self.save()
        if self._on_any(self._signals.number is not None):
            self.say(f"interrupted: {self.saved}")
            raise Interrupted(self._signals.number or 2)

    # ---- messages ----

    @property
    def saved(self) -> str:
        """Message for the user: which step is saved if the run ends now."""
        if self.directory is None or not self.saved_step:
            return "nothing is saved"
        return f"step {self.saved_step} is saved: continue with resume (--resume) in {self.directory.path}"

    def say(self, *lines: str | None) -> None:
        """Print lines of the run's report on the main process; None and empty lines are skipped."""
        if self.distributed.is_main:
            for line in filter(None, lines):
                say(line)

    # ---- the end ----

    def close(self) -> None:
        """Release the directory's lock."""
        if self.directory is not None:
            self.directory.close()

    def _on_any(self, answer: bool) -> bool:
        """Whether `answer` is True on any process; the same result on all."""
        return bool(self.distributed.all_sum(torch.tensor(float(answer))) > 0)

    def _rescue(self) -> None:
        """After an error, save the completed steps. Not with several processes: a checkpoint needs all of them, and they
        may be at different points."""
        if self.distributed.world_size > 1 or self.directory is None:
            return
        before = self.saved_step
        try:
            self._sync_logs()
        except TrainingError as failure:  # no reason to lose the weights too
            self.say(str(failure))
        if self._save(self.step + 1):  # the error came between learning and logging
            self.step += 1
        elif not self._save(self.step):
            self.say(f"stopped in the middle of an update; {self.saved}")
        if self.saved_step > before:
            self.say(f"stopped; {self.saved}")

    def _open_logs(self) -> None:
        """Open the logs, and delete lines of steps that this run will repeat (left by an interrupted run)."""
        with disk_errors("The tracker cannot be started"):
            self.distributed.start_tracking(self._tracker, self.description)
        if self.directory is not None and self.distributed.is_main:
            self._metrics = MetricsWriter(self.directory.path)
            self._metrics.truncate_to(self.step - 1)
            if (self.directory.path / COMPLETIONS_FILE).exists():
                self._open_samples()
        self._clock = time.perf_counter()

    def _open_samples(self) -> None:
        if self._samples is None and self.directory is not None:
            self._samples = JsonLines(self.directory.path / COMPLETIONS_FILE)
            self._samples.truncate_to(self.step - 1)

    def _sync_logs(self) -> None:
        """Flush the logs to disk: a run goes on from a checkpoint only with the lines of the steps before it."""
        for file in self._files():
            file.sync()

    def _files(self) -> list[MetricsWriter | JsonLines]:
        return [file for file in (self._metrics, self._samples) if file is not None]

    def _close_logs(self) -> None:
        self._display.close()
        for file in self._files():
            file.close()
        self._metrics = self._samples = None
        try:
            self.distributed.close()
        except Exception as failure:  # whatever a tracker raises whose files are gone: the run's own error comes first
            self.say(f"the tracker could not be closed: {failure}")


def _load(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
    """Load all parts, the first one last. All that the parts can check is checked before anything is changed."""
    for method in ("check", "load"):
        for name, part in reversed(list(parts.items())):
            try:
                if method == "load":
                    part.load(checkpoint.part(name))
                elif hasattr(part, "check"):
                    part.check(checkpoint.part(name), checkpoint.step)
            except InputError as error:
                text = str(error)
                raise InputError(text if str(checkpoint.path) in text else f"{checkpoint.path}: {text}") from error
            except TrainingError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
                raise InputError(
                    f"{checkpoint.path}: the state of {name!r} cannot be read ({type(error).__name__}: {error}). {ANOTHER}"
                ) from error


def _check_part(name: str, part: Any) -> None:
    """Raise InputError now, rather than at the first save, if a part cannot say what it takes to continue."""
    kind = type(part).__name__
    if not all(callable(getattr(part, method, None)) for method in ("state", "load")):
        raise InputError(f"{name}: {kind} needs the methods state(step) and load(saved), see `Part`.")
    saved = part.state(0)
    if not isinstance(saved, Saved | None):
        raise InputError(f"{name}: {kind}.state must return a `Saved`, not a {type(saved).__name__}.")
    try:
        same = saved is None or json.loads(json.dumps(saved.values)) == saved.values
    except (TypeError, ValueError):
        same = False
    if not same:
        raise InputError(
            f"{name}: JSON cannot hold what {kind}.state gives: {str(saved)[:200]}. Use text, numbers, lists, and "
            "dictionaries whose keys are text."
        )
