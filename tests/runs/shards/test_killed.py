"""A process is killed at each disk call of a save in shards, or the disk refuses it: no step is lost."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from rlhf.errors import TrainingError
from rlhf.runs import checkpoint as format_module
from rlhf.runs.checkpoint import MANIFEST, seal
from rlhf.runs.directory import RunDirectory
from tests.runs.content import CONFIG, assert_is_exactly, failing, shares, state
from tests.runs.shards.pair import BOTH, KILLED, Writer, save, two
from tests.runs.test_faults import WHEN, Fault, Faults, outcome


def test_two_processes_write_a_file_each_and_one_reads_them_exactly(template):
    assert outcome(template) == "old"
    names = {path.name for path in (template / "checkpoints" / "step-000002").iterdir()}
    shards = {f"{group}.0000{n}-of-00002.safetensors" for group in ("policy", "optimizer") for n in (1, 2)}
    assert names == shards | {MANIFEST, "state.json"}
    second = safe_open(template / "checkpoints" / "step-000002" / "policy.00002-of-00002.safetensors", framework="pt")
    assert second.get_slice("gate").get_shape() == [0, 4], "an empty share"


def test_what_two_processes_write_has_the_same_bytes_each_time(template, tmp_path):
    path = shutil.copytree(template, tmp_path / "run")
    shutil.rmtree(path / "checkpoints" / "step-000002")
    assert two(path, lambda run: save(run, 2)) == [0, 0]
    for file in (template / "checkpoints" / "step-000002").iterdir():
        assert (path / "checkpoints" / "step-000002" / file.name).read_bytes() == file.read_bytes()


# --- a process is killed ----------------------------------------------------------------------------------------------


def disk_calls(writer: Writer, template: Path, tmp_path: Path) -> list[list[str]]:
    """Each process's calls by which it touches the disk."""
    path = shutil.copytree(template, tmp_path / "count")

    def work(run: RunDirectory) -> None:
        faults = Faults(pytest.MonkeyPatch())
        writer(run, 3)
        (tmp_path / f"calls-{run.rank}.json").write_text(json.dumps(faults.calls))

    assert two(path, work) == [0, 0]
    return [json.loads((tmp_path / f"calls-{rank}.json").read_text()) for rank in (0, 1)]


def killed(writer: Writer, path: Path, rank: int, at: int, who: str) -> list[int]:
    """Exit codes of two processes of which one, or both, are killed after disk call `at` of `rank`; a file of tensors is
    then half written."""

    def die() -> None:
        os.killpg(0, signal.SIGKILL) if who == BOTH else os.kill(os.getpid(), signal.SIGKILL)

    def work(run: RunDirectory) -> None:
        if run.rank == rank:
            Faults(pytest.MonkeyPatch(), at, "torn", fail=die)
        writer(run, 3)

    return two(path, work)


def kill_points(calls: list[list[str]]) -> list[tuple[int, int, str]]:
    """(rank, number of its disk call, who is killed)"""
    alone = [(rank, at, "it") for rank in (0, 1) for at in range(len(calls[rank]))]
    return alone + [(rank, at, BOTH) for rank, at, _ in alone]


def test_whichever_process_is_killed_at_whichever_disk_call_the_newest_checkpoint_is_whole(template, tmp_path):
    """The other process ends too; both can then be started again, and write the step again."""
    calls = disk_calls(save, template, tmp_path)
    assert calls[1] == ["save_file", "save_file", "fsync", "fsync"], "one file per group"
    points = kill_points(calls)
    assert len(points) >= 60 and {"mkdir", "write", "chmod", "rename", "unlink", "rmdir"} <= set(calls[0])
    renamed = calls[0].index("rename")
    for rank, at, who in points:
        path = shutil.copytree(template, tmp_path / f"{rank}-{at}-{who}")
        codes = killed(save, path, rank, at, who)
        assert codes[rank] == KILLED and codes[1 - rank] == (KILLED if who == BOTH else 3)
        found = outcome(path)
        assert found == ("new" if rank == 0 and at >= renamed else "old"), (rank, at, who)
        if found == "old" and who != BOTH:  # what lies there is the same if both are
            assert two(path, lambda run: save(run, 3)) == [0, 0]
            assert outcome(path) == "new"
        shutil.rmtree(path)


def early_renamer(run: RunDirectory, step: int) -> None:
    """Negative control: the main process names the checkpoint before the other one has written its rows."""
    final = run.checkpoints / f"step-{step:06d}"
    run._begin(final, step, {}, json.dumps(state(step)))
    written = run._write_shards(final.with_name(f"{final.name}.tmp"), shares(step, 0)) if run.is_main else {}
    run._end(final, step, CONFIG, written)
    run.barrier()
    if not run.is_main:
        run._write_shards(final, shares(step, 1))
    run.barrier()


def forgetful_writer(run: RunDirectory, step: int) -> None:
    """Negative control: the manifest does not list the other process's files."""
    final = run.checkpoints / f"step-{step:06d}"
    temporary = final.with_name(f"{final.name}.tmp")
    run._begin(final, step, {}, json.dumps(state(step)))
    run.barrier()
    if run.is_main:
        written = run._write_shards(temporary, shares(step, 0))
        seal(temporary, step, CONFIG, written)
    run.barrier()
    if not run.is_main:
        run._write_shards(temporary, shares(step, 1))
    run.barrier()
    if run.is_main:
        os.rename(temporary, final)
        run._prune()
    run.barrier()


def in_place_writer(run: RunDirectory, step: int) -> None:
    """Negative control: the same files, written straight into the folder that readers look at."""
    final = run.checkpoints / f"step-{step:06d}"
    if run.is_main:
        format_module.write_files(final, step, {}, json.dumps(state(step)))
    run.barrier()
    written = run.gather([run._write_shards(final, shares(step, run.rank))])
    if run.is_main:
        seal(final, step, CONFIG, written[0] | written[1])
    run.barrier()


def early_pruner(run: RunDirectory, step: int) -> None:
    """Negative control: makes room for the new checkpoint before it is safe."""
    if run.is_main:
        for path in run._steps().values():
            format_module.discard(path)
    run.barrier()
    save(run, step)


@pytest.mark.parametrize("writer", [early_renamer, forgetful_writer, in_place_writer, early_pruner])
def test_the_harness_catches_writers_that_are_not_safe(writer, template, tmp_path):
    points = kill_points(disk_calls(writer, template, tmp_path))
    caught = 0
    for rank, at, who in reversed([point for point in points if point[2] != BOTH]):
        path = shutil.copytree(template, tmp_path / f"{rank}-{at}")
        killed(writer, path, rank, at, who)
        caught += outcome(path) not in ("old", "new")
        if caught == 3:
            return
    raise AssertionError(f"{writer.__name__} was caught at {caught} points only")


def test_the_harness_catches_a_process_that_waits_for_ever(template, tmp_path, monkeypatch):
    """Negative control."""
    monkeypatch.setattr("tests.runs.shards.pair.PATIENCE_S", 0.3)

    def work(run: RunDirectory) -> None:
        os._exit(0) if run.rank else time.sleep(60)

    with pytest.raises(AssertionError, match="hung"):
        two(shutil.copytree(template, tmp_path / "run"), work)


# --- the disk refuses one process -------------------------------------------------------------------------------------


def outcome_of_refusal(path: Path, disk: Callable[[], Any]) -> list[str]:
    """The errors that two processes raise when they save with what `disk` does to the second one; then they save again."""

    def work(run: RunDirectory) -> None:
        with pytest.raises(TrainingError) as raised, disk() if run.rank else nullcontext():
            save(run, 3)
        (path / f"error-{run.rank}").write_text(str(raised.value))
        run.barrier()
        assert sorted(entry.name for entry in run.checkpoints.iterdir()) == ["step-000001", "step-000002"]
        assert_is_exactly(run.latest(), 2)
        run.barrier()
        save(run, 3)

    assert two(path, work) == [0, 0]
    return [(path / f"error-{rank}").read_text() for rank in (0, 1)]


@contextmanager
def refused(at: int, when: str, code: str) -> Iterator[None]:
    number = getattr(errno, code)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, when, failing(Fault(number, os.strerror(number))))
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on file sizes stands for it: the error comes from the write of safetensors itself."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_refusal(path: Path, disk: Callable[[], Any], reason: str) -> None:
    first, second = outcome_of_refusal(path, disk)
    assert first == second and str(path / "checkpoints" / "step-000003") in first
    assert reason in first and first.endswith("then resume.")
    assert outcome(path) == "new"


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("at", range(4), ids=["file-1", "file-2", "fsync-1", "fsync-2"])
def test_a_disk_that_refuses_one_process_is_the_same_error_in_both_and_costs_nothing(
    at, when, code, template, tmp_path
):
    path = shutil.copytree(template, tmp_path / "run")
    check_refusal(path, lambda: refused(at, when, code), os.strerror(getattr(errno, code)))


def test_a_disk_that_is_full_inside_one_process_s_file_is_the_same_error_in_both(template, tmp_path):
    check_refusal(shutil.copytree(template, tmp_path / "run"), full_disk, "too large")
