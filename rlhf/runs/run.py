"""One run: its directory, log files and tracker, its callbacks, its signals, its checkpoints, and how it goes on.

    run = Run(output_dir, distributed, description=settings, must_match={"seed"}, callbacks=[...])
    run.open(resume=True)                                        # claims the directory
    run.restore({"learner": learner, "source": source})          # from the checkpoint, if there is one
    with run.training():
        while run.step < total_steps and not run.stopping():
            ...                                                  # collect, learn
            run.log(metrics, samples)                            # the step is done: run.step is one higher
            run.save()                                           # every so many steps
        run.finish()

Language models and control tasks use this same object; what each of them saves is a mapping of named parts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.runs.callbacks import Callback
from rlhf.runs.checkpoint import Checkpoint, Part
from rlhf.runs.directory import RunDirectory
from rlhf.runs.jsonlines import COMPLETIONS_FILE, JsonLines, MetricsWriter
from rlhf.runs.metrics import unknown_names
from rlhf.runs.reporting import Display, say
from rlhf.runs.resume import check_resumable
from rlhf.runs.signals import Interrupted, Signals, waiting_signals


class Run:
    """Every process of a run makes one; only the main one writes. With `output_dir` None nothing is written at all."""

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
        """description: settings and fingerprints, kept in checkpoints. must_match: those that a resumed run must share.

        keep_checkpoints: how many of the newest stay; None: all. writes: names of files and folders in output_dir that the
        run's owner writes. tracker: the run's name in a tracker, if `distributed` has one.
        """
        self.distributed, self.callbacks = distributed, list(callbacks)
        self.description, self.must_match, self._tracker = description, must_match, tracker
        self.step = self.saved_step = 0
        """Steps that are done, and that are in a checkpoint."""
        self.should_stop = False
        """A callback's wish to end after the current step."""
        self.directory: RunDirectory | None = None
        if output_dir is not None:
            self.directory = RunDirectory(
                output_dir,
                is_main=distributed.is_main,
                barrier=distributed.barrier,
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

        resume: True for the newest whole checkpoint here, or the path of one (or of a run). overwrite: replace the run that
        the directory holds. InputError if that is refused, or if the checkpoint belongs to a run with other settings; the
        directory is then as before, and free.
        """
        if self.directory is None:
            return
        checkpoint = self.directory.open(resume, overwrite)
        if checkpoint is not None:
            try:
                changed = check_resumable(checkpoint.config, self.description, must_match=self.must_match)
            except InputError:
                self.close()
                raise
            self.say(f"resumed from {checkpoint.path}", *[f"changed since: {note}" for note in changed])
        self.step = self.saved_step = checkpoint.step if checkpoint else 0
        self._checkpoint = checkpoint

    @property
    def resumes(self) -> bool:
        """Whether `open` found a checkpoint, from which `restore` will continue."""
        return self._checkpoint is not None

    def restore(self, parts: Mapping[str, Part]) -> None:
        """What the run is made of, by name: from now on `save` saves these, and they continue from the checkpoint that
        `open` found. InputError, and the directory is free again, if it is of other parts."""
        checkpoint, self._checkpoint = self._checkpoint, None
        self._parts = parts
        if checkpoint is None:
            return
        try:
            for name, part in parts.items():
                part.load(checkpoint.part(name))
        except BaseException:
            self.close()
            raise

    @contextmanager
    def training(self, display: Display | None = None) -> Iterator[None]:
        """Around the loop: logs and tracker are open, and Ctrl-C and SIGTERM wait for the end of a step (a second one does
        not). If an error ends the loop, the steps that are done are saved first."""
        self.should_stop = False
        self._display = display or Display()
        try:
            self._open_logs()
            self.say(*self.distributed.notes)
            with waiting_signals() as self._signals:
                yield
        except BaseException:
            self._rescue()
            raise
        finally:
            self._close_logs()

    # ---- step by step ----

    def stopping(self) -> bool:
        """Whether to end here: a callback of some process wants it, or a signal came. All processes call it alike."""
        return self._on_any(self.should_stop or self._signals.number is not None)

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """The step is done: one line of metrics and one of seconds, one line per sample, the bar and the tracker."""
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
        self.distributed.track(tracked, at)
        self.step += 1

    def notify(self, hook: str, *arguments: Any) -> None:
        """Call `hook` of every callback; each is handed copies of dictionaries."""
        for callback in self.callbacks:
            getattr(callback, hook)(*[dict(a) if isinstance(a, dict) else a for a in arguments])

    def save(self) -> None:
        """A checkpoint of the steps that are done; nothing if there is one. All processes call it, between two steps."""
        saved = self._save()
        assert saved, "a checkpoint is written between two steps"

    def _save(self) -> bool:
        """Whether the parts are those after the steps that are done, and so are saved."""
        if self.directory is None or self.saved_step == self.step:
            return True
        states = {name: part.state(self.step) for name, part in self._parts.items()}
        parts = {name: state for name, state in states.items() if state is not None}
        if len(parts) < len(states):
            return False
        for file in self._files():
            file.sync()
        tensors = [group for saved in parts.values() for group in saved.tensors.items()]
        assert len(dict(tensors)) == len(tensors), "two parts save tensors under one name"
        values = {name: saved.values for name, saved in parts.items()}
        self.directory.save(self.step, dict(tensors), values, config=self.description)
        self.saved_step = self.step
        return True

    def finish(self) -> None:
        """After the last step: what is not saved yet is. Raises Interrupted if a signal ended the loop."""
        self.save()
        if self._on_any(self._signals.number is not None):
            self.say(f"interrupted: {self.saved}")
            raise Interrupted(self._signals.number or 2)

    # ---- telling ----

    @property
    def saved(self) -> str:
        """What is left of the run if it ends now, for the user."""
        if self.directory is None or not self.saved_step:
            return "nothing is saved"
        return f"step {self.saved_step} is saved: continue with resume (--resume) in {self.directory.path}"

    def say(self, *lines: str | None) -> None:
        """Lines of the run's report, by the main process."""
        if self.distributed.is_main:
            for line in filter(None, lines):
                say(line)

    # ---- the end ----

    def close(self) -> None:
        """Give the directory back."""
        if self.directory is not None:
            self.directory.close()

    def _on_any(self, answer: bool) -> bool:
        """Whether some process says so: then all do the same."""
        return bool(self.distributed.all_sum(torch.tensor(float(answer))) > 0)

    def _rescue(self) -> None:
        """After an error: the steps that are done are not lost. With several processes the others may be elsewhere, and a
        checkpoint needs all of them."""
        if self.distributed.world_size > 1 or self.directory is None or self.step == self.saved_step:
            return
        if self._save():
            self.say(f"stopped; {self.saved}")

    def _open_logs(self) -> None:
        """Continues the files where this run begins: later lines, of one that was interrupted, are cut."""
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

    def _files(self) -> list[MetricsWriter | JsonLines]:
        return [file for file in (self._metrics, self._samples) if file is not None]

    def _close_logs(self) -> None:
        self._display.close()
        for file in self._files():
            file.close()
        self._metrics = self._samples = None
        self.distributed.close()
