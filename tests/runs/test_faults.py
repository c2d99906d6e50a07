"""Checkpoints when the disk fails or the process is killed: the newest whole one stays good."""

import errno
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

from rlhf.errors import InputError, TrainingError
from rlhf.runs import checkpoint as format_module
from rlhf.runs import shards
from rlhf.runs.checkpoint import read_checkpoint, write_files
from rlhf.runs.directory import RunDirectory
from tests.runs.content import CONFIG, assert_is_exactly, failing, save, state, tensors

# --- faults and kills -------------------------------------------------------------------------------------------------


class Fault(OSError):
    pass


class Faults:
    """Counts every call by which a save touches the disk; at number `at` it fails before, halfway through or after."""

    def __init__(self, monkeypatch, at: int | None = None, when: str = "before", fail=None) -> None:
        self.calls, self.at, self.when = [], at, when
        self.fail = fail or failing(Fault(28, "No space left on device"))
        for name in ("fsync", "rename", "chmod", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(shards, "save_file", self.wrap("save_file", shards.save_file, torn=True))
        monkeypatch.setattr(format_module.shutil, "copyfile", self.wrap("copyfile", shutil.copyfile, torn=True))
        monkeypatch.setattr(format_module, "open", self.open, raising=False)

    def wrap(self, name, function, torn=False):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) - 1 != self.at:
                return function(*args, **kwargs)
            if self.when != "before":
                function(*args, **kwargs)
            if self.when == "torn" and torn:
                target = args[1]
                os.truncate(target, os.path.getsize(target) // 2)
            return self.fail()

        return call

    def open(self, path, mode):
        file = open(path, mode)  # noqa: SIM115
        if "b" in mode and ("x" in mode or "w" in mode):
            write = file.write

            class Torn:
                name = path

                def __enter__(torn):
                    return torn

                def __exit__(torn, *_):
                    file.close()

                def __getattr__(torn, attribute):
                    return getattr(file, attribute)

                def write(torn, data):
                    self.calls.append("write")
                    if len(self.calls) - 1 != self.at:
                        return write(data)
                    if self.when != "before":
                        write(data if self.when == "after" else data[: len(data) // 2])
                        file.flush()
                    return self.fail()

            return Torn()
        return file


def in_place_writer(run: RunDirectory, step: int) -> None:
    """Negative control: the same files, written straight into the directory that readers look at."""
    path = run.checkpoints / f"step-{step:06d}"
    write_files(path, step, tensors(step), json.dumps(state(step)))
    format_module.seal(path, step, CONFIG)
    run._prune()


def early_pruner(run: RunDirectory, step: int) -> None:
    """Negative control: makes room for the new checkpoint before it is safe."""
    for path in run._steps().values():
        format_module.discard(path)
    save(run, step)


def outcome(path: Path) -> str:
    """What a new process finds in the run's directory: "old", "new", or what is wrong."""
    run = RunDirectory(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # falling back means that a broken checkpoint lay under a final name
            checkpoint = run.open(resume=True)
        if checkpoint is None:
            return "nothing"
        for path in run._steps().values():  # whatever has a final name is whole, the old ones too
            assert_is_exactly(read_checkpoint(path), int(path.name[-6:]))
        left = {file.name for file in run.checkpoints.iterdir()}
        if checkpoint.step == 2:
            return "old" if left <= {"step-000001", "step-000002"} else f"old and {left}"
        return "new" if left <= {"step-000001", "step-000002", "step-000003"} else f"new and {left}"
    except (UserWarning, InputError, AssertionError) as error:
        return f"broken: {error}"
    finally:
        run.close()


def started(path: Path) -> RunDirectory:
    """An open run that holds the checkpoints of steps 1 and 2."""
    template = path.parent / "template"
    if not template.exists():
        run = RunDirectory(template)
        run.open()
        save(run, 1)
        save(run, 2)
        run.close()
    shutil.copytree(template, path)
    run = RunDirectory(path)
    run.open(resume=True)
    return run


def fault_points(writer, tmp_path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        run = started(tmp_path / "count")
        faults = Faults(patch)
        writer(run, 3)
        run.close()
    return faults.calls


WHEN = ("before", "torn", "after")


def outcome_of_fault(writer, path: Path, at: int, when: str, code: str) -> tuple[str, Exception | None]:
    """What a new process finds after a save whose disk call number `at` failed, and the error that the save raised."""
    run = started(path)
    raised = None
    number = getattr(errno, code)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, when, failing(Fault(number, os.strerror(number))))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed clean-up only warns
                writer(run, 3)
        except (TrainingError, Fault) as error:
            raised = error
    run.close()
    return outcome(run.path), raised


CALLS = [
    *(
        "mkdir",
        "save_file",
        "save_file",
        "write",
        "fsync",
        "chmod",
        "fsync",
        "chmod",
        "fsync",
        "chmod",
        "fsync",
        "fsync",
    ),
    *("write", "fsync", "fsync", "rename", "fsync"),  # the manifest, and the checkpoint is in its place
    *("rename", "unlink", "unlink", "unlink", "unlink", "rmdir"),  # the oldest one goes
]
"""Every call by which a save touches the disk."""
RENAMED = CALLS.index("rename")


def test_the_disk_calls_of_a_save_are_these(tmp_path):
    assert fault_points(save, tmp_path) == CALLS


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EACCES"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("at", range(len(CALLS)), ids=[f"{at}-{name}" for at, name in enumerate(CALLS)])
def test_a_fault_at_any_disk_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, at, when, code):
    found, error = outcome_of_fault(save, tmp_path / "run", at, when, code)
    assert found == ("new" if (at, when != "before") > (RENAMED, False) else "old")  # new exactly from the rename on
    if at <= RENAMED + 1:
        assert isinstance(error, TrainingError) and os.strerror(getattr(errno, code)) in str(error)
        assert str(tmp_path / "run" / "checkpoints" / "step-000003") in str(error) and "resume" in str(error)
    else:
        assert error is None  # only the old one is not deleted


@pytest.mark.parametrize("writer", [in_place_writer, early_pruner])
def test_the_harness_catches_a_writer_that_is_not_safe(tmp_path, writer):
    results = [
        outcome_of_fault(writer, tmp_path / f"{at}-{when}", at, when, "ENOSPC")[0]
        for at in range(len(fault_points(writer, tmp_path)))
        for when in WHEN
    ]
    assert sum(result not in ("old", "new") for result in results) >= 10


def test_files_are_flushed_before_the_manifest_and_the_manifest_before_the_rename(run, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new)))
    save(run, 1)
    data = {"policy.safetensors", "optimizer.safetensors", "state.json"}
    manifest = events.index("MANIFEST.json")
    assert data <= set(events[:manifest])
    assert events[manifest:] == ["MANIFEST.json", "step-000001.tmp", "rename", "checkpoints"]


def test_a_disk_that_is_full_inside_the_tensor_file_is_a_training_error(tmp_path):
    """A limit on file sizes, in a child, stands for the full disk: the error comes from safetensors' own write."""
    started(tmp_path / "run").close()
    child = os.fork()
    if child == 0:
        run = RunDirectory(tmp_path / "run")
        run.open(resume=True)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            run.save(3, {"policy": {"weight": torch.zeros(100_000)}}, {})
        except TrainingError as error:
            os._exit(42 if "step-000003" in str(error) and "too large" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert outcome(tmp_path / "run") == "old"


def test_after_a_failed_save_the_run_can_save_again(run, monkeypatch):
    save(run, 1)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at=3)
        with pytest.raises(TrainingError, match=r"step-000002.*No space left.*Earlier ones are whole"):
            save(run, 2)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]  # the disk got its space back
    save(run, 2)
    assert_is_exactly(run.latest(), 2)


def test_pruning_that_fails_costs_no_checkpoint_and_only_warns(tmp_path):
    run = started(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else failing(Fault())())
        with pytest.warns(UserWarning, match="step-000001 was not deleted"):
            save(run, 3)
    assert_is_exactly(run.latest(), 3)


@pytest.mark.parametrize("writer", [save, in_place_writer])
def test_a_process_killed_at_a_disk_call_leaves_one_whole_checkpoint(tmp_path, writer):
    """SIGKILL in a forked child: nothing of Python's clean-up runs, the lock goes with the process."""
    calls = fault_points(writer, tmp_path)
    found = []
    for at in range(len(calls)):
        path = tmp_path / str(at)
        started(path).close()
        child = os.fork()
        if child == 0:
            run = RunDirectory(path, keep=2)
            run.open(resume=True)
            Faults(pytest.MonkeyPatch(), at, "torn", fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
            writer(run, 3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found.append(outcome(path))
    if writer is save:
        assert set(found) == {"old", "new"}
    else:
        assert sum(result not in ("old", "new") for result in found) >= 3
