"""A checkpoint is all or nothing: enumerated faults and kills, every kind of damage, names, and who may write where."""

import hashlib
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

from rlhf import checkpoint as run_module
from rlhf import checkpoint_format as format_module
from rlhf.checkpoint import RunDirectory
from rlhf.checkpoint_format import FORMAT, DamagedCheckpoint, read_checkpoint, write_files
from rlhf.errors import InputError, TrainingError

CONFIG = {"learning_rate": 1e-5, "ppo": {"clip_range": 0.2}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Content that is a function of the step, so that a mixture of two checkpoints is recognised."""
    generator = torch.Generator().manual_seed(step)
    policy = {"head": torch.randn(3, 4, generator=generator), "bias": torch.randn(4, generator=generator).double()}
    return {"policy": policy, "optimizer": {"step/head": torch.tensor(float(step))}}


def state(step: int) -> dict:
    return {"kl_coef": 0.1 + 0.2 * step, "cursor": step, "algorithm": {"scores": [1 / 3, 1e-300, step]}}


def save(run: RunDirectory, step: int) -> None:
    run.save(step, tensors(step), state(step), config=CONFIG)


def assert_is_exactly(checkpoint, step: int) -> None:
    assert checkpoint.step == step and checkpoint.state == state(step) and checkpoint.config == CONFIG
    for group, named in tensors(step).items():
        loaded = checkpoint.tensors(group)
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[name], named[name]) and loaded[name].dtype == named[name].dtype for name in named)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Flushing matters when the power fails, which no test can show; that it is called in order, one test does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run", keep=2)
    run.open()
    yield run
    run.close()


# --- saving and finding -----------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_comes_back_exactly(run):
    save(run, 7)
    assert_is_exactly(run.latest(), 7)
    assert_is_exactly(run.load(7), 7)
    assert_is_exactly(run.load(run.checkpoints / "step-000007"), 7)
    assert_is_exactly(run.load(str(run.path)), 7)


def test_only_the_newest_are_kept_and_they_are_the_ones_expected(run):
    for step in (1, 2, 10, 1_000_000):
        save(run, step)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000010", "step-1000000"]
    assert_is_exactly(run.latest(), 1_000_000)  # numbers, not text, decide what is newest


def test_bfloat16_tied_transposed_empty_and_scalar_tensors_survive(run):
    weight = torch.randn(4, 6)
    odd = {
        "bfloat16": torch.randn(5).bfloat16(),
        "embedding": weight,
        "tied": weight,
        "transposed": weight.t(),
        "slice": weight[:, 1:3],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(weight.clone()),
    }
    run.save(1, {"policy": odd, "nothing": {}}, {})
    loaded = run.latest().tensors("policy")
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in odd.items())
    assert run.latest().tensors("nothing") == {}
    with pytest.raises(InputError, match=r"no value\.safetensors"):
        run.latest().tensors("value")


def test_copied_files_are_part_of_the_checkpoint(run, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    path = run.save(1, {}, {}, copies={"tokenizer.json": tmp_path / "tokenizer.json"})
    assert (path / "tokenizer.json").read_text() == "{}"
    (path / "tokenizer.json").write_text("[]")
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.json"):
        run.load(1)


def test_equal_content_gives_equal_bytes(tmp_path):
    contents = []
    for name in "ab":
        run = RunDirectory(tmp_path / name)
        run.open()
        save(run, 3)
        contents.append({file.name: file.read_bytes() for file in (run.checkpoints / "step-000003").iterdir()})
    assert contents[0] == contents[1]


def test_files_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run = RunDirectory(tmp_path / "run")
        run.open()
        save(run, 1)
    finally:
        os.umask(before)
    files = list((run.checkpoints / "step-000001").iterdir())
    assert len(files) == 4
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": (1, 2)}, {1: "x"}, {"x": {2: 3}}])
def test_state_that_json_would_change_is_refused(run, bad):
    with pytest.raises(TrainingError, match="step 5"):
        run.save(5, {}, bad)
    assert run.latest() is None


@pytest.mark.parametrize("group", ["../evil", "/tmp/evil", ".hidden", "a/b", "", "x" * 200])
def test_no_group_name_leaves_the_checkpoint_directory(run, group):
    with pytest.raises((TrainingError, InputError)):
        run.save(1, {group: {"x": torch.zeros(1)}}, {})
    assert run.latest() is None and list(run.path.parent.rglob("*evil*")) == []


def test_a_step_is_never_written_twice(run):
    save(run, 1)
    with pytest.raises(TrainingError, match=r"step-000001.*already"):
        run.save(1, {}, {})
    assert_is_exactly(run.latest(), 1)


def test_main_renames_only_after_all_processes_have_arrived(tmp_path):
    seen = []
    run = RunDirectory(tmp_path / "run")
    run.open()
    run.barrier = lambda: seen.append(sorted(path.name for path in run.checkpoints.iterdir()))
    save(run, 1)
    assert seen == [["step-000001.tmp"], ["step-000001"]]


def test_other_processes_write_nothing_and_find_the_same_checkpoint(run):
    save(run, 4)
    waits = []
    other = RunDirectory(run.path, is_main=False, barrier=lambda: waits.append(1))
    before = sorted(run.path.rglob("*"))
    assert_is_exactly(other.open(resume=True), 4)
    other.save(5, tensors(5), state(5))
    assert sorted(run.path.rglob("*")) == before and len(waits) == 3 + 2


# --- damage -----------------------------------------------------------------------------------------------------------


def missing(data: bytes) -> None:
    return None


def bit_flip(position: float, bit: int):
    def flip(data: bytes) -> bytes:
        index = min(int(position * len(data)), len(data) - 1)
        return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]

    return flip


DAMAGE = {
    "missing": missing,
    "empty": lambda data: b"",
    "first half": lambda data: data[: len(data) // 2],
    "last byte cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    **{f"bit {bit} at {position}": bit_flip(position, bit) for bit in (0, 6) for position in (0.0, 0.3, 0.6, 1.0)},
}
FILES = ["policy.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_used(run, file, damage):
    save(run, 1)
    save(run, 2)
    path = run.checkpoints / "step-000002" / file
    data = DAMAGE[damage](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"step-000001.*step-000002/{file}"):
        assert_is_exactly(run.latest(), 1)
    with pytest.raises(InputError, match=rf"step-000002/{file}"):
        run.latest(strict=True)
    with pytest.raises(DamagedCheckpoint, match=file):
        run.load(2)  # asked for by name, it is never replaced by another


def test_every_bit_of_the_manifest_is_covered(run):
    save(run, 1)
    path = run.checkpoints / "step-000001" / "MANIFEST.json"
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :])
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(path.parent)


@pytest.mark.parametrize("file", FILES)
def test_a_file_from_another_step_is_noticed(run, file):
    save(run, 1)
    save(run, 2)
    shutil.copy(run.checkpoints / "step-000001" / file, run.checkpoints / "step-000002" / file)
    with pytest.warns(UserWarning, match=file):
        assert_is_exactly(run.latest(), 1)


def test_verification_reads_the_content_and_not_only_the_size(run, monkeypatch):
    save(run, 1)
    path = run.checkpoints / "step-000001" / "policy.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint):
        run.load(1)
    listed = json.loads((path.parent / "MANIFEST.json").read_bytes())["files"]
    assert listed["state.json"]["sha256"] == hashlib.sha256((path.parent / "state.json").read_bytes()).hexdigest()
    monkeypatch.setattr(format_module, "_sha256", lambda file: listed[file.name]["sha256"])
    assert run.load(1).step == 1  # negative control: without the hash the damage goes unseen


def test_if_no_checkpoint_is_good_nothing_is_started_from_scratch(run):
    save(run, 1)
    (run.checkpoints / "step-000001" / "state.json").unlink()
    run.close()
    with pytest.raises(InputError, match=r"state\.json.*overwrite"):
        RunDirectory(run.path).open(resume=True)


def test_the_damaged_step_can_be_written_again_and_its_remains_are_kept(run):
    save(run, 1)
    save(run, 2)
    (run.checkpoints / "step-000002" / "state.json").write_text("x")
    run.close()
    resumed = RunDirectory(run.path)
    with pytest.warns(UserWarning, match="step-000001"):
        assert_is_exactly(resumed.open(resume=True), 1)
    save(resumed, 2)
    assert_is_exactly(resumed.latest(), 2)
    assert (run.checkpoints / "step-000002.damaged-1" / "state.json").read_text() == "x"


def test_links_and_traversal_in_a_manifest_are_refused(run, tmp_path):
    save(run, 1)
    path = run.checkpoints / "step-000001"
    (tmp_path / "secret").write_bytes((path / "state.json").read_bytes())
    (path / "state.json").unlink()
    (path / "state.json").symlink_to(tmp_path / "secret")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        run.load(1)
    body = json.loads((path / "MANIFEST.json").read_bytes())
    body.pop("sha256")
    body["files"]["../../../secret"] = body["files"].pop("state.json")
    body["files"]["state.json"] = body["files"]["../../../secret"]
    (path / "MANIFEST.json").write_bytes(format_module._manifest_bytes(body))
    with pytest.raises(DamagedCheckpoint, match="secret"):
        run.load(1)


def test_a_file_that_the_manifest_does_not_list_is_not_read(run):
    save(run, 1)
    path = run.checkpoints / "step-000001"
    shutil.copy(path / "policy.safetensors", path / "planted.safetensors")
    with pytest.raises(InputError, match="planted"):
        run.load(1).tensors("planted")


def test_another_format_version_is_an_error_and_no_damage(run, monkeypatch):
    save(run, 1)
    monkeypatch.setitem(FORMAT, "version", 2)
    save(run, 2)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version"):
        run.latest()


JUNK = [
    "best",
    "step-11.tmp",
    "step-000009.tmp",
    "step-9",
    "step-0000009",
    "xstep-000009",
    "step-000009\n",
    "step--00009",
]


@pytest.mark.parametrize("name", [*JUNK, "step-000009.damaged-1", "step-\u0660\u0660\u0660\u0660\u0660\u0669"])
def test_other_names_are_not_checkpoints(run, name):
    save(run, 1)
    shutil.copytree(run.checkpoints / "step-000001", run.checkpoints / name)
    (run.checkpoints / "step-000008").symlink_to(run.checkpoints / "step-000001")
    (run.checkpoints / "step-000007").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_exactly(run.latest(), 1)


# --- claiming the directory -------------------------------------------------------------------------------------------


def test_a_directory_with_a_run_is_refused_resumed_or_overwritten(run):
    save(run, 1)
    save(run, 2)
    (run.path / "metrics.jsonl").write_text('{"step": 2}\n')
    (run.path / "notes.txt").write_text("mine")
    run.close()
    with pytest.raises(InputError, match=r"already holds a run.*resume.*another output_dir.*overwrite"):
        RunDirectory(run.path).open()
    resumed = RunDirectory(run.path)
    assert_is_exactly(resumed.open(resume=True), 2)
    resumed.close()
    same = RunDirectory(run.path)
    assert_is_exactly(same.open(resume=str(run.path)), 2)  # its own path means the same as True
    same.close()
    fresh = RunDirectory(run.path)
    assert fresh.open(overwrite=True) is None
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "RUN.json", "checkpoints", "notes.txt"]
    assert fresh.latest() is None


def test_a_run_without_anything_yet_is_simply_started_again(run):
    run.close()
    again = RunDirectory(run.path)
    assert again.open() is None
    again.close()
    assert RunDirectory(run.path).open(resume=True) is None  # it died before its first checkpoint: start at step 0


def test_resume_from_an_earlier_step_must_say_that_later_ones_go(run):
    run.keep = None
    for step in (1, 2, 3):
        save(run, step)
    run.close()
    with pytest.raises(InputError, match=r"step-000002.*step-000003.*overwrite"):
        RunDirectory(run.path).open(resume=str(run.checkpoints / "step-000001"))
    assert len(list(run.checkpoints.iterdir())) == 3
    branch = RunDirectory(run.path)
    assert_is_exactly(branch.open(resume=str(run.checkpoints / "step-000001"), overwrite=True), 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]


def test_a_new_run_can_start_from_another_runs_checkpoint(run, tmp_path):
    save(run, 3)
    other = RunDirectory(tmp_path / "other")
    assert_is_exactly(other.open(resume=str(run.path)), 3)
    save(other, 4)
    assert_is_exactly(run.latest(), 3)


def test_a_bad_resume_path_deletes_nothing_even_with_overwrite(run, tmp_path):
    save(run, 1)
    run.close()
    for path in (tmp_path / "nowhere", tmp_path / "nowhere" / "step-000009"):
        with pytest.raises(InputError, match="nowhere"):
            RunDirectory(run.path).open(resume=str(path), overwrite=True)
        assert_is_exactly(run.latest(), 1)


def test_resume_without_a_run_is_an_error_and_makes_nothing(tmp_path):
    with pytest.raises(InputError, match="no run to resume"):
        RunDirectory(tmp_path / "typo").open(resume=True)
    with pytest.raises(InputError, match="only one"):
        RunDirectory(tmp_path / "typo").open(resume=True, overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "times.jsonl", "completions.jsonl", "policy"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_we_did_not_write_is_never_touched(tmp_path, name, overwrite):
    mine = tmp_path / name
    mine.mkdir() if "." not in name else mine.write_text("mine")
    with pytest.raises(InputError, match=f"{name}.*another output_dir"):
        RunDirectory(tmp_path).open(overwrite=overwrite)
    assert list(tmp_path.iterdir()) == [mine]


def test_overwrite_keeps_a_step_directory_that_has_no_manifest(run):
    path = run.checkpoints / "step-000005"
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    run.close()
    RunDirectory(run.path).open(overwrite=True)
    assert [file.read_text() for file in run.checkpoints.rglob("thesis.txt")] == ["mine"]


def test_an_output_dir_that_cannot_be_used_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"output_dir.*file"):
            RunDirectory(path).open()
    monkeypatch.setattr(run_module.os, "open", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"output_dir.*Permission denied"):
        RunDirectory(tmp_path / "read_only").open()
    with pytest.raises(InputError, match="at least 1"):
        RunDirectory(tmp_path, keep=0)


def failing(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_stale_temporary_directories_go_when_the_run_is_opened_again(run):
    save(run, 1)
    for name in ("step-000002.tmp", "my.tmp", "step-2.tmp"):
        (run.checkpoints / name).mkdir()
    run.close()
    RunDirectory(run.path).open(resume=True)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["my.tmp", "step-000001", "step-2.tmp"]


def test_a_second_process_is_refused_while_the_first_one_lives(run):
    with pytest.raises(InputError, match="in use by another process"):
        RunDirectory(run.path).open()  # also a second time in one process: the lock belongs to the open file
    assert exit_code_of_opening(run.path) == 42
    run.close()
    assert exit_code_of_opening(run.path) == 0


def exit_code_of_opening(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            RunDirectory(path).open(resume=True)
        except InputError as error:
            os._exit(42 if "in use" in str(error) else 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
        monkeypatch.setattr(format_module, "save_file", self.wrap("save_file", format_module.save_file, torn=True))
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
    write_files(path, step, tensors(step), json.dumps(state(step)), {})
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


def outcomes_of_faults(writer, tmp_path) -> dict[tuple[int, str, str], str]:
    """Every disk call of a save x {fails before, torn, fails after} -> what a new process finds afterwards."""
    results = {}
    for at, name in enumerate(fault_points(writer, tmp_path)):
        for when in ("before", "torn", "after"):
            run = started(tmp_path / f"{at}-{when}")
            with pytest.MonkeyPatch.context() as patch:
                Faults(patch, at, when)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # a failed clean-up only warns
                        writer(run, 3)
                except (TrainingError, Fault) as error:
                    assert isinstance(error, Fault) or "step-000003" in str(error)
            run.close()
            results[at, name, when] = outcome(run.path)
    return results


def test_a_fault_at_any_disk_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path):
    results = outcomes_of_faults(save, tmp_path)
    touched = {name for _, name, _ in results}
    assert touched == {"save_file", "write", "fsync", "chmod", "rename", "unlink", "rmdir", "mkdir"}
    assert len(results) >= 60
    assert set(results.values()) == {"old", "new"}, {k: v for k, v in results.items() if v not in ("old", "new")}
    renamed = next(at for at, name, _ in results if name == "rename")
    for (at, _, when), result in results.items():  # new exactly from the rename on
        assert result == ("new" if (at, when != "before") > (renamed, False) else "old")


@pytest.mark.parametrize("writer", [in_place_writer, early_pruner])
def test_the_harness_catches_a_writer_that_is_not_safe(tmp_path, writer):
    results = outcomes_of_faults(writer, tmp_path)
    assert sum(result not in ("old", "new") for result in results.values()) >= 10


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
