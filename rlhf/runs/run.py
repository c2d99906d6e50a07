"""One run: its directory, log files and tracker, its callbacks, its signals, its checkpoints, and how it goes on.

    run = Run(output_dir, distributed, description=settings, must_match={"seed"}, callbacks=[...])
    checkpoint = run.open(resume=True)              # None: nothing to continue, start at step 0
    with run.training(parts):
        while run.step < total_steps and not run.stopping():
            ...                                     # collect, learn
            run.log(metrics, samples)               # the step is done: run.step is one higher
            run.save(parts())                       # every so many steps
        run.finish(parts())

Language models and control tasks use this same object; what each of them saves is a mapping of named parts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.runs.callbacks import Callback
from rlhf.runs.checkpoint import Checkpoint, Saved
from rlhf.runs.directory import RunDirectory
from rlhf.runs.jsonlines import COMPLETIONS_FILE, JsonLines, MetricsWriter
from rlhf.runs.metrics import unknown_names
from rlhf.runs.reporting import Display, say
from rlhf.runs.resume import check_resumable
from rlhf.runs.signals import Interrupted, Signals, waiting_signals

Parts = Callable[[], Mapping[str, Saved] | None]
"""What a run is made of at this moment, by name; None while it is between two steps and belongs to none."""


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
        self._signals = Signals()
        self._display = Display()
        self._metrics: MetricsWriter | None = None
        self._samples: JsonLines | None = None
        self._clock = 0.0

    # ---- the beginning ----

    def open(self, *, resume: bool | str = False, overwrite: bool = False) -> Checkpoint | None:
        """Claim the directory; the checkpoint to continue from, or None to start at step 0. All processes call it.

        resume: True for the newest whole checkpoint here, or the path of one (or of a run). overwrite: replace the run that
        the directory holds. InputError if that is refused, or if the checkpoint belongs to a run with other settings; the
        directory is then as before, and free.
        """
        if self.directory is None:
            return None
        checkpoint = self.directory.open(resume, overwrite)
        if checkpoint is not None:
            try:
                changed = check_resumable(checkpoint.config, self.description, must_match=self.must_match)
            except InputError:
                self.close()
                raise
            self.say(f"resumed from {checkpoint.path}", *[f"changed since: {note}" for note in changed])
        self.step = self.saved_step = checkpoint.step if checkpoint else 0
        return checkpoint

    @contextmanager
    def training(self, parts: Parts, display: Display | None = None) -> Iterator[None]:
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
            self._rescue(parts)
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

    def save(self, parts: Mapping[str, Saved] | None) -> None:
        """A checkpoint of the steps that are done; nothing if there is one. All processes call it."""
        if self.directory is None or self.saved_step == self.step:
            return
        assert parts is not None, "a checkpoint is written between two steps"
        for file in self._files():
            file.sync()
        tensors = [group for saved in parts.values() for group in saved.tensors.items()]
        assert len(dict(tensors)) == len(tensors), "two parts save tensors under one name"
        values = {name: saved.values for name, saved in parts.items()}
        self.directory.save(self.step, dict(tensors), values, config=self.description)
        self.saved_step = self.step

    def finish(self, parts: Mapping[str, Saved] | None) -> None:
        """After the last step: what is not saved yet is. Raises Interrupted if a signal ended the loop."""
        self.save(parts)
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

    def say(self, *lines: str) -> None:
        """Lines of the run's report, by the main process."""
        if self.distributed.is_main:
            for line in lines:
                say(line)

    # ---- the end ----

    def close(self) -> None:
        """Give the directory back."""
        if self.directory is not None:
            self.directory.close()

    def _on_any(self, answer: bool) -> bool:
        """Whether some process says so: then all do the same."""
        return bool(self.distributed.all_sum(torch.tensor(float(answer))) > 0)

    def _rescue(self, parts: Parts) -> None:
        """After an error: the steps that are done are not lost. With several processes the others may be elsewhere, and a
        checkpoint needs all of them."""
        if self.distributed.world_size > 1 or self.directory is None or self.step == self.saved_step:
            return
        whole = parts()
        if whole is not None:
            self.save(whole)
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
