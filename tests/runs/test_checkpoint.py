"""A checkpoint comes back exactly or not at all: what is saved, every kind of damage, and who may write where."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from rlhf.errors import InputError, TrainingError
from rlhf.runs import checkpoint as format_module
from rlhf.runs import directory as run_module
from rlhf.runs.checkpoint import FORMAT, DamagedCheckpoint, read_checkpoint
from rlhf.runs.directory import RunDirectory
from tests.runs.content import assert_is_exactly, failing, save, state, tensors

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

    def gather(items):
        seen.append(sorted(path.name for path in run.checkpoints.iterdir()))
        return items

    run.gather = gather
    save(run, 1)
    assert seen == [["step-000001.tmp"], ["step-000001.tmp"], ["step-000001"]]


def test_other_processes_write_nothing_and_find_the_same_checkpoint(run):
    save(run, 4)
    waits = []
    exchanged = []
    other = RunDirectory(
        run.path,
        is_main=False,
        barrier=lambda: waits.append(1),
        gather=lambda items: exchanged.append(1) or items,  # type: ignore[func-returns-value]
    )
    before = sorted(run.path.rglob("*"))
    assert_is_exactly(other.open(resume=True), 4)
    other.save(5, tensors(5), state(5))
    assert sorted(run.path.rglob("*")) == before
    assert len(waits) == 3 + 1 and len(exchanged) == 3  # as often as the main process


# --- damage -----------------------------------------------------------------------------------------------------------


def missing(data: bytes) -> None:
    return None


def cut(position: float):
    return lambda data: data[: int(position * len(data))]


def bit_flip(position: float, bit: int):
    def flip(data: bytes) -> bytes:
        index = min(int(position * len(data)), len(data) - 1)
        return data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :]

    return flip


DAMAGE = {
    "missing": missing,
    "empty": lambda data: b"",
    **{f"cut at {at}": cut(at) for at in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "last byte cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    **{f"bit {bit} at {at}": bit_flip(at, bit) for at, bit in ((0.0, 0), (0.25, 6), (0.5, 3), (0.75, 7), (1.0, 0))},
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
    monkeypatch.setitem(FORMAT, "version", FORMAT["version"] + 1)
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


def test_a_refused_checkpoint_leaves_nothing_in_a_new_directory(run, tmp_path):
    save(run, 1)

    def refuse(checkpoint):
        raise InputError("of another run")

    with pytest.raises(InputError, match="of another run"):
        RunDirectory(tmp_path / "new").claim(resume=str(run.path), accept=refuse)
    assert not (tmp_path / "new").exists()


def test_claiming_a_directory_deletes_nothing_before_it_is_cleared(run, tmp_path):
    """Between the two, a run finds out whether the checkpoint fits it."""
    other = RunDirectory(tmp_path / "other")
    other.open()
    save(other, 4)
    run.keep = None
    save(run, 1)
    save(run, 2)
    (run.path / "metrics.jsonl").write_text("mine")
    run.close()
    first = run.checkpoints / "step-000001"
    for resume in (str(other.path), first):
        again = RunDirectory(run.path)
        again.claim(resume=resume, overwrite=True)
        assert {path.name for path in run.checkpoints.iterdir()} == {"step-000001", "step-000002"}
        again.close()
    again.claim(resume=first, overwrite=True)
    again.clear()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"] and (
        run.path / "metrics.jsonl"
    ).exists()
    again.close()
    again.claim(resume=str(other.path), overwrite=True)
    again.clear()
    assert not list(run.checkpoints.iterdir()) and not (run.path / "metrics.jsonl").exists()


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
        RunDirectory(tmp_path, others=["policy"]).open(overwrite=overwrite)
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
