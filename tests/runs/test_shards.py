"""Checkpoints in shards, written by two processes: killed, refused by the disk, damaged or edited, no step is lost.

The processes are real ones, connected by a pipe; their files and SIGKILLs are real too.
"""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.errors import InputError, TrainingError
from rlhf.layout import FullySharded
from rlhf.runs import checkpoint as format_module
from rlhf.runs.checkpoint import MANIFEST, seal
from rlhf.runs.directory import RunDirectory
from rlhf.runs.shards import StoredTensors, write_shards
from rlhf.types import Shard
from tests.one_house.test_damage import Watch, resealed
from tests.one_house.worlds import At, Breaks, Tokens, breaks
from tests.runs.content import CONFIG, assert_is_exactly, failing, shares, state
from tests.runs.test_checkpoint import DAMAGE
from tests.runs.test_faults import WHEN, Fault, Faults, outcome

Writer = Callable[[RunDirectory, int], None]
BOTH = "both"
PATIENCE_S = 20.0
KILLED = -signal.SIGKILL

# --- two processes ----------------------------------------------------------------------------------------------------


def directory(path: Path, rank: int, pipe: Connection) -> RunDirectory:
    """The run's directory in one of two processes; an exchange with one that has ended raises EOFError or OSError."""

    def gather(items: list[Any]) -> list[Any]:
        pipe.send(items)
        others = pipe.recv()
        return [*items, *others] if rank == 0 else [*others, *items]

    def barrier() -> None:
        gather([])

    return RunDirectory(path, is_main=rank == 0, barrier=barrier, gather=gather, rank=rank, processes=2)


def two(path: Path, work: Callable[[RunDirectory], None], resume: bool = True) -> list[int]:
    """Fork two processes, each of which opens the run and does `work`. Returns their exit codes: 0, or 3 after an error,
    or minus the signal. Both are in one process group. Fails if one hangs."""
    pipes = multiprocessing.Pipe()
    children: list[int] = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            pipes[1 - rank].close()
            _live(directory(path, rank, pipes[rank]), work, resume)
        os.setpgid(child, (children or [child])[0])
        children.append(child)
    for pipe in pipes:
        pipe.close()
    return [exit_code(child) for child in children]


def _live(run: RunDirectory, work: Callable[[RunDirectory], None], resume: bool) -> None:
    """A child's whole life."""
    code = 3
    try:
        warnings.simplefilter("ignore")
        run.open(resume=resume)
        work(run)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"a process hung for {PATIENCE_S} s after the other one had ended")


def save(run: RunDirectory, step: int) -> None:
    run.save(step, shares(step, run.rank), state(step), config=CONFIG)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run that holds the checkpoints of steps 1 and 2, in shards."""
    path = tmp_path_factory.mktemp("template") / "run"

    def work(run: RunDirectory) -> None:
        save(run, 1)
        save(run, 2)

    assert two(path, work, resume=False) == [0, 0]
    return path


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
    monkeypatch.setattr("tests.runs.test_shards.PATIENCE_S", 0.3)

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


# --- damage -----------------------------------------------------------------------------------------------------------

OLD, NEW = "step-000001", "step-000002"
SHARDS = [f"{group}.0000{n}-of-00002.safetensors" for group in ("policy", "optimizer") for n in (1, 2)]


def other_rank(file: str) -> str:
    return file.replace("00001-of", "0000x-of").replace("00002-of", "00001-of").replace("0000x-of", "00002-of")


def of_another_step(path: Path, file: str) -> None:
    shutil.copy(path.with_name(OLD) / file, path / file)


def of_the_other_process(path: Path, file: str) -> None:
    held = (path / file).read_bytes()
    (path / file).write_bytes((path / other_rank(file)).read_bytes())
    (path / other_rank(file)).write_bytes(held)


def of_three_processes(path: Path, file: str) -> None:
    """The file of the same process among three."""
    group, rank = file.split(".")[0], SHARDS.index(file) % 2
    written = write_shards(path, group, shares(2, rank, 3)[group], rank, 3)
    written.rename(path / file)


def damaged(how: Callable[[bytes], bytes | None]) -> Callable[[Path, str], None]:
    def damage(path: Path, file: str) -> None:
        data = how((path / file).read_bytes())
        (path / file).unlink() if data is None else (path / file).write_bytes(data)

    return damage


DAMAGES = [
    pytest.param(file, damage, id=f"{file}-{name}")
    for files, damages in (
        ([*SHARDS, "state.json", MANIFEST], {name: damaged(how) for name, how in DAMAGE.items()}),
        ([*SHARDS, "state.json", MANIFEST], {"of another step": of_another_step}),
        (SHARDS, {"of the other process": of_the_other_process, "of three processes": of_three_processes}),
    )
    for file in files
    for name, damage in damages.items()
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_the_newest_whole_checkpoint_is_used(file, damage, template, tmp_path):
    path = shutil.copytree(template, tmp_path / "run")
    damage(path / "checkpoints" / NEW, file)
    swapped = damage is of_the_other_process  # then the first of the two is named
    named = min(file, other_rank(file)) if swapped else file
    with pytest.warns(UserWarning, match=rf"{OLD}.*{NEW}/{named}"):
        assert_is_exactly(RunDirectory(path).latest(), 1)


def test_files_of_another_number_of_processes_that_the_manifest_does_not_list_are_not_read(template, tmp_path):
    """Such as those of a save by three processes that was killed."""
    path = shutil.copytree(template, tmp_path / "run")
    for rank in range(3):
        write_shards(path / "checkpoints" / NEW, "policy", shares(1, rank, 3)["policy"], rank, 3)
    assert_is_exactly(RunDirectory(path).latest(), 2)


# --- edited, and sealed anew ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory) -> tuple[Path, bytes]:
    """A run whose checkpoint lies in the files of two processes, and the weights that it ends with when it is resumed."""
    folder = tmp_path_factory.mktemp("broken_off") / "run"
    with pytest.raises(Breaks):
        Tokens().start(folder, callbacks=[At(0, lambda trainer: trainer.run.save()), At(1, breaks)])
    shutil.rmtree(folder / "checkpoints" / OLD, ignore_errors=True)
    (path,) = (folder / "checkpoints").iterdir()
    whole = shutil.copytree(folder, tmp_path_factory.mktemp("whole") / "run")
    Tokens().start(whole, resume=True)
    resealed(path, in_two_files)
    return folder, (whole / Tokens().weights_file).read_bytes()


def in_two_files(path: Path) -> None:
    for group in ("policy", "optimizer"):
        file = path / f"{group}.safetensors"
        named = dict(StoredTensors([file], "."))
        file.unlink()
        for rank in (0, 1):
            write_shards(path, group, {name: part for name, t in named.items() for part in _halves(t, rank)}, rank, 2)


def _halves(tensor: torch.Tensor, rank: int) -> list[Any]:
    """What process `rank` of two has of the tensor, if anything."""
    if not tensor.dim():
        return [tensor] * (rank == 0)
    half = -(-len(tensor) // 2)
    return [Shard(tensor[half:].clone(), half) if rank else Shard(tensor[:half].clone(), 0)]


Edit = Callable[[dict[str, torch.Tensor], dict[str, Any], str], Any]
"""Changes a file's tensors or first_rows, or returns other first_rows, or their text ("": there are none); it gets the name
of a tensor that has rows in both files."""


def edited(file: str, edit: Edit) -> Callable[[Path], None]:
    def of(path: Path) -> None:
        opened = safe_open(path / file, framework="pt")
        named = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        firsts = json.loads(opened.metadata()["first_rows"])
        name = next(name for name in sorted(named) if named[name].dim() == 2 and len(named[name]) > 1)
        changed = edit(named, firsts, name)
        text = changed if isinstance(changed, str) else json.dumps(firsts if changed is None else changed)
        save_file(named, path / file, metadata={"first_rows": text} if text else None)

    return of


def begins_at(row: Any) -> Edit:
    return lambda named, firsts, name: firsts.update({name: row})


def shifted(by: int) -> Edit:
    return lambda named, firsts, name: firsts.update({name: firsts[name] + by})


def unlisted(named, firsts, name) -> None:
    del firsts[name]


def gone(named, firsts, name) -> None:
    del named[name], firsts[name]


def without_first_row(named, firsts, name) -> None:
    named[name] = named[name][1:].clone()


def without_last_row(named, firsts, name) -> None:
    named[name] = named[name][:-1].clone()


def retyped(named, firsts, name) -> None:
    named[name] = named[name].bfloat16()


def narrower(named, firsts, name) -> None:
    named[name] = named[name][:, 1:].clone()


def scalar(named, firsts, name) -> None:
    named[name] = torch.tensor(1.0)


EDITS: dict[str, Edit] = {
    "rows overlap": shifted(-1),
    "a hole": shifted(+1),
    "rows from 0 on again": begins_at(0),
    "a negative row": begins_at(-1),
    "a row that is text": begins_at("2"),
    "a row that is no whole number": begins_at(1.5),
    "a row that is true": begins_at(True),
    "a row that is null": begins_at(None),
    "a huge row": begins_at(2**70),
    "no JSON": lambda *_: "{",
    "deep JSON": lambda *_: "[" * 100_000,
    "a list": lambda *_: [0, 1],
    "a number": lambda *_: "3",
    "no header": lambda *_: "",
    "an unlisted tensor": unlisted,
    "a tensor in one file only": gone,
    "a row less at the front": without_first_row,
    "a row less at the end": without_last_row,
    "another type": retyped,
    "narrower rows": narrower,
    "a scalar": scalar,
}


def left_out(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def exchanged(group: str) -> Callable[[Path], None]:
    """The two processes' rows in the wrong order, each file with its own header."""

    def of(path: Path) -> None:
        of_the_other_process(path, f"{group}.00001-of-00002.safetensors")

    return of


def exchanged_headers(group: str) -> Callable[[Path], None]:
    """In the wrong order, as the headers say: they would fit, and the rows are those of the other process."""

    def of(path: Path) -> None:
        files = [path / f"{group}.0000{n}-of-00002.safetensors" for n in (1, 2)]
        headers = [safe_open(file, framework="pt").metadata() for file in files]
        for file, header in zip(files, reversed(headers), strict=True):
            opened = safe_open(file, framework="pt")
            named = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            save_file(named, file, metadata=header)

    return of


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: (path / old).rename(path / new)


def added(file: str, name: str) -> Callable[[Path], None]:
    return lambda path: shutil.copy(path / file, path / name)


def edits() -> list[Any]:
    found = []
    for group in ("policy", "optimizer"):
        first, second = (f"{group}.0000{n}-of-00002.safetensors" for n in (1, 2))
        cases: dict[str, Callable[[Path], Any]] = {
            **{f"{file}-{name}": edited(file, edit) for file in (second,) for name, edit in EDITS.items()},
            f"{first}-begins later": edited(first, begins_at(1)),
            f"{first}-a tensor in one file only": edited(first, gone),
            f"{first}-a row less": edited(first, without_last_row),
            f"{first}-left out": left_out(first),
            f"{second}-left out": left_out(second),
            f"{group}-exchanged": exchanged(group),
            f"{group}-headers exchanged": exchanged_headers(group),
            f"{second}-of three": renamed(second, f"{group}.00002-of-00003.safetensors"),
            f"{second}-a third": added(second, f"{group}.00003-of-00003.safetensors"),
            f"{group}-whole too": added(first, f"{group}.safetensors"),
            f"{second}-as the whole": lambda path, first=first, second=second, group=group: (
                (path / first).unlink(),
                (path / second).rename(path / f"{group}.safetensors"),
            ),
        }
        found += [pytest.param(group, edit, id=name) for name, edit in cases.items()]
    return found


@pytest.fixture
def copy(broken_off, tmp_path) -> Path:
    return shutil.copytree(broken_off[0], tmp_path / "run")


def checkpoint_of(run: Path) -> Path:
    (path,) = (run / "checkpoints").iterdir()
    return path


def test_a_run_goes_on_from_the_files_of_two_processes_as_from_one_file(broken_off, copy):
    Tokens().start(copy, resume=True)
    assert (copy / Tokens().weights_file).read_bytes() == broken_off[1]


@pytest.mark.parametrize(("group", "edit"), edits())
def test_files_that_were_edited_and_sealed_anew_are_refused_before_anything_is_loaded(group, edit, copy, monkeypatch):
    path = checkpoint_of(copy)
    resealed(path, edit)
    watch = Watch(monkeypatch)
    with pytest.raises(InputError, match=rf"{path}.*{group}\.(0|safetensors).*Resume (from|with)") as raised:
        Tokens().start(copy, resume=True)
    assert "cannot be read (" not in str(raised.value), "not an error of torch or JSON that was met by chance"
    assert watch.unchanged()
    RunDirectory(copy)._take_lock("here")  # it is free


def test_without_the_check_of_rows_exchanged_files_would_be_loaded(broken_off, copy, monkeypatch):
    """Negative control: the halves of a tensor fit each other either way."""
    resealed(checkpoint_of(copy), exchanged("policy"))
    monkeypatch.setattr("rlhf.runs.shards._gap", lambda pieces, files: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokens().start(copy, resume=True)
    assert (copy / Tokens().weights_file).read_bytes() != broken_off[1]


# --- memory -----------------------------------------------------------------------------------------------------------

COUNT = 20
ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""


class Spread:
    """Stands for a DTensor of which this process holds a share: the whole tensor is made when it is gathered."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def full_tensor(self) -> torch.Tensor:
        whole = torch.zeros(3)
        Spread.alive.add(Whole(whole))
        Spread.most = max(Spread.most, len(Spread.alive))
        return whole


class Whole:
    """Lives as long as the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor.lives = self  # type: ignore[attr-defined]


def test_gathering_holds_one_whole_tensor_at_a_time():
    """On the processes that do not write."""
    Spread.most = 0
    named = {str(number): Spread() for number in range(COUNT)}
    assert FullySharded.whole(SimpleNamespace(is_main=False), named) == {}  # type: ignore[arg-type]
    assert Spread.most == 1
    assert len(FullySharded.whole(SimpleNamespace(is_main=True), named)) == COUNT  # type: ignore[arg-type]


READING = """
import sys
from pathlib import Path
from rlhf.runs.shards import StoredTensors

def own_mb():  # without what the operating system may drop: pages of files
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

stored = StoredTensors(sorted(Path(sys.argv[1]).glob("*.safetensors")), "")
for hold in (False, True):
    before, most, held = own_mb(), 0.0, []
    for tensor in stored.values():
        most = max(most, own_mb() - before)
        held += [tensor] * hold
    print(most)
"""


@pytest.mark.skipif("RssAnon" not in STATUS, reason="this system does not say how much memory is the process's own")
def test_reading_holds_one_whole_tensor_at_a_time(tmp_path):
    """20 tensors of 8 MB in two files, in a new process; and negative control: with all of them held."""
    half = torch.ones(2**20)
    for rank in (0, 1):
        named = {str(number): Shard(half, rank * len(half)) for number in range(COUNT)}
        write_shards(tmp_path, "policy", named, rank, 2)
    frees_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # else holes in the heap are counted too
    command = [sys.executable, "-c", READING, tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=frees_at_once, capture_output=True, text=True, check=True)
    one_by_one, held = map(float, done.stdout.split())
    assert one_by_one < 3 * 8, "one, the one before it, and what is small"
    assert held > (COUNT - 4) * 8
