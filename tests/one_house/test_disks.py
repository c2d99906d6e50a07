"""A disk that is full or refuses, and things that lie in the place of a run's files: one clear error, nothing is lost."""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from gym_baselines.agent import AGENT_FILE, WEIGHTS_FILE
from rlhf import InputError, TrainingError
from rlhf.runs import files
from rlhf.runs.checkpoint import read_checkpoint
from rlhf.runs.directory import RunDirectory
from rlhf.runs.jsonlines import JsonLines
from rlhf.runs.run import Run
from rlhf.training.learner import Learner
from tests import tiny
from tests.one_house.disk_faults import CODES, refusing
from tests.one_house.worlds import STEPS, WORLDS, At, Breaks, Control, Tokens, breaks

OURS = (InputError, TrainingError)
LAST = f"step-{STEPS:06d}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """World -> what a run leaves that nothing disturbed."""
    left = {}
    for world in (Tokens(), Control()):
        folder = tmp_path_factory.mktemp("whole")
        world.start(folder)
        left[type(world)] = world.left(folder)
    return left


def weights(world, whole) -> bytes:
    return whole[type(world)][world.weights_file]


def steps(folder: Path) -> list[str]:
    """The checkpoints, each of them verified."""
    paths = sorted((folder / "checkpoints").glob("step-*"))
    return [path.name for path in paths if read_checkpoint(path)]


def is_free(folder: Path) -> bool:
    """Whether the directory's lock was released."""
    other = RunDirectory(folder)
    try:
        other._take_lock("here")
    finally:
        other.close()
    return True


def goes_on(world, folder: Path, whole) -> bool:
    """Whether the run now ends with the weights of the one that nothing disturbed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fault after the rename leaves a checkpoint that is made twice
        world.start(folder, resume=(folder / "RUN.json").exists())
    return (folder / world.weights_file).read_bytes() == weights(world, whole)


# --- one call is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_of_which_the_disk_refuses_any_one_call_names_it_and_loses_no_step(
    world, code, whole, tmp_path, monkeypatch
):
    """From the first folder to the export of the policy; the three errors take turns at the calls, so all are covered."""
    learnt = []
    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, *a, **k: (learn(self, *a, **k), learnt.append(1))[0])
    with refusing(tmp_path / "count") as disk:
        world.start(tmp_path / "count")
    assert len(disk.calls) >= 45
    raw = []
    for at in range(list(CODES).index(code), len(disk.calls), len(CODES)):
        folder = tmp_path / str(at)
        learnt.clear()
        with refusing(folder, at, code):
            try:
                world.start(folder)
            except OURS as error:
                assert str(folder) in str(error) and os.strerror(CODES[code]) in str(error)
                assert not learnt or steps(folder) == [f"step-{len(learnt):06d}"], disk.calls[at]
            except Exception as error:
                raw.append((disk.calls[at], error))
        assert not folder.exists() or is_free(folder)
        assert goes_on(world, folder, whole), disk.calls[at]
    assert raw == []


@pytest.mark.parametrize("world", WORLDS)
def test_without_the_one_place_that_names_errors_they_would_be_raw(world, tmp_path, monkeypatch):
    """Negative control: every error of the disk goes through `disk_errors`."""
    with refusing(tmp_path / "count") as disk:
        world.start(tmp_path / "count")
    monkeypatch.setattr(files.disk_errors.__wrapped__, "__code__", (lambda *a, **k: (yield)).__code__)
    for at in range(1, len(disk.calls), 16):
        with refusing(tmp_path / str(at), at), pytest.raises(OSError):
            world.start(tmp_path / str(at))


@pytest.mark.parametrize("world", WORLDS)
def test_a_log_on_a_full_device_ends_the_run_at_that_step_which_is_saved(world, whole, tmp_path):
    def full(trainer):
        log = trainer.run._metrics._metrics
        log._file.close()
        log._file = open("/dev/full", "ab")  # noqa: SIM115  the kernel's own ENOSPC

    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written at step 2.*No space left.*then resume"):
        world.start(tmp_path, callbacks=[At(1, full)])
    assert steps(tmp_path) == ["step-000003"] and is_free(tmp_path)
    assert goes_on(world, tmp_path, whole)


@pytest.mark.parametrize("when", ["at the start", "during the run"])
def test_a_tracker_that_cannot_be_written_ends_the_run_with_one_error(when, tmp_path):
    tracker = tmp_path / "tracker"
    if when == "at the start":
        tracker.write_text("mine")
    action = At(0, lambda trainer: shutil.rmtree(tracker))
    trainer = tiny.trainer(tmp_path, total_steps=50, tracker="tensorboard", callbacks=[action])
    with pytest.raises(TrainingError, match=rf"The tracker cannot be (started|written).*{tracker}.*then resume"):
        trainer.train()
    assert is_free(tmp_path) and len(steps(tmp_path)) == (when == "during the run")


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free", [0, 8, 24, 40, 56, 64, 80, 112, 128, 144])
@pytest.mark.parametrize("world", WORLDS)
def test_a_full_disk_costs_nothing_that_was_saved_and_the_run_goes_on_when_there_is_space(
    world, free, whole, small_disk
):
    """free: kilobytes left when the second step has ended: for no checkpoint, for a part of it, for no policy, for all."""

    def fill(trainer):
        trainer.run.save()
        disk = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - free * 1024)))

    folder = small_disk / "run"
    try:
        world.start(folder, callbacks=[At(1, fill)])
    except OURS as error:
        assert str(folder) in str(error) and "No space left" in str(error)
        policy = ("not written" in str(error) and "policy" in str(error).split(":")[0]) or "The agent" in str(error)
        assert steps(folder) == (["step-000002", LAST] if policy else ["step-000002"])
        assert not (folder / world.weights_file).exists() and "resume" in str(error)
    else:
        assert free >= 80
    assert is_free(folder) and not list(folder.rglob("*.tmp"))
    (small_disk / "ballast").unlink()
    assert goes_on(world, folder, whole)


# --- something lies in the place of a file ----------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "times.jsonl", "completions.jsonl")


def places(*names: str):
    """(world, name of a file of its runs)"""
    pairs = []
    control = [name for name in names if name not in ("policy", "completions.jsonl")]
    for world, named in (
        (Tokens(), names),
        (Control(), [*control, *([WEIGHTS_FILE, AGENT_FILE] * ("policy" in names))]),
    ):
        for name in named:
            pairs.append(pytest.param(world, name, id=f"{type(world).__name__}-{name}"))
    return pairs


def other_than(path: Path, elsewhere: Path, what: str) -> None:
    """Puts something else in the place of a run's file or folder, whose content moves elsewhere."""
    wanted_folder = path.suffix == ""
    if path.exists():
        path.rename(elsewhere)
    if what == "link":
        if not elsewhere.exists():
            elsewhere.mkdir() if wanted_folder else elsewhere.touch()
        path.symlink_to(elsewhere)
    elif what == "dangling link":
        path.symlink_to("nowhere")
    elif what == "the other kind":
        path.write_text("mine") if wanted_folder else path.mkdir()
    else:
        assert what == "nothing"


def put_back(path: Path, elsewhere: Path) -> None:
    files.delete(path)
    if elsewhere.exists():
        elsewhere.rename(path)


@pytest.mark.parametrize("what", ["link", "dangling link", "the other kind"])
@pytest.mark.parametrize(("world", "name"), places(*LOGS, "checkpoints", "policy"))
def test_what_lies_in_the_place_of_a_file_at_the_start_is_named_and_left_alone(world, name, what, whole, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with pytest.raises(Breaks):
        world.start(folder, callbacks=[At(1, breaks)])
    other_than(folder / name, elsewhere, what)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=rf"{folder / name} is a (link|folder|file), where .* Move it away"):
        world.start(folder, resume=True)
    assert sorted(folder.rglob("*")) == before and is_free(folder)
    put_back(folder / name, elsewhere)
    assert goes_on(world, folder, whole)


@pytest.mark.parametrize("what", ["link", "dangling link", "the other kind", "nothing"])
@pytest.mark.parametrize(("world", "name"), places(*LOGS, "checkpoints"))
def test_a_file_that_is_lost_or_replaced_during_a_run_ends_it_and_every_step_is_saved(
    world, name, what, whole, tmp_path
):
    """Checkpoints are written wherever that can be done: through a link, and in a folder that is made again."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    made = name == "checkpoints" and what in ("link", "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            world.start(folder, callbacks=[At(1, lambda trainer: other_than(folder / name, elsewhere, what))])
            assert made
        except TrainingError as error:
            assert not made and str(folder / name) in str(error) and "resume" in str(error)
    assert is_free(folder)
    if name != "checkpoints":
        assert steps(folder) == ["step-000003"]  # the log was missed at the third step, which had been learnt
    if made:
        assert steps(folder) == [LAST]
    put_back(folder / name, elsewhere)
    assert goes_on(world, folder, whole)


@pytest.mark.parametrize("world", WORLDS)
def test_a_directory_that_is_removed_during_a_run_is_made_again_for_what_is_trained(world, whole, tmp_path):
    folder = tmp_path / "runs" / "mine"
    with pytest.raises(TrainingError, match=rf"{folder}/metrics\.jsonl.*removed or replaced during the run"):
        world.start(folder, callbacks=[At(1, lambda trainer: shutil.rmtree(tmp_path / "runs"))])
    assert steps(folder) == ["step-000003"] and is_free(folder)
    assert goes_on(world, folder, whole)


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_written_into_the_directory_of_another_run_that_took_the_place_of_this_one(world, tmp_path):
    folder = tmp_path / "run"

    def another(trainer):
        folder.rename(tmp_path / "moved")
        other = RunDirectory(folder)
        other.open()
        other.close()

    with pytest.raises(TrainingError, match=r"removed or replaced during the run") as raised:
        world.start(folder, callbacks=[At(1, another)])
    assert "Put the run's own directory back" in raised.value.__notes__[0]
    assert steps(folder) == [] and is_free(folder) and is_free(tmp_path / "moved")


@pytest.mark.parametrize("what", ["link", "dangling link", "the other kind"])
@pytest.mark.parametrize(("world", "name"), places("policy"))
def test_a_policy_that_cannot_be_put_in_its_place_at_the_very_end_is_in_the_last_checkpoint(
    world, name, what, whole, tmp_path
):
    if isinstance(world, Control) and "link" in what:
        pytest.skip("a file replaces a link by the same rename that replaces a file")
    folder = tmp_path / "run"
    place = At(STEPS - 1, lambda trainer: other_than(folder / name, tmp_path / "elsewhere", what))
    with pytest.raises(OURS, match=rf"{folder}.*(last checkpoint holds the trained policy.*then|when it is) resume"):
        world.start(folder, callbacks=[place])
    assert steps(folder) == [LAST] and is_free(folder)
    files.delete(folder / name)
    assert goes_on(world, folder, whole)


# --- the tests above are sharp ----------------------------------------------------------------------------------------


def without_rescue(monkeypatch):
    monkeypatch.setattr(Run, "_rescue", lambda self: None)


def without_a_look_at_the_place(monkeypatch):
    monkeypatch.setattr(JsonLines, "_check_place", lambda self: None)


def without_coming_back(monkeypatch):
    monkeypatch.setattr(RunDirectory, "_come_back", lambda self: None)


@pytest.mark.parametrize("broken", [without_rescue, without_a_look_at_the_place, without_coming_back])
def test_a_run_that_is_broken_on_purpose_loses_what_the_test_above_asks_for(broken, whole, tmp_path, monkeypatch):
    broken(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, OSError)):
        test_a_directory_that_is_removed_during_a_run_is_made_again_for_what_is_trained(Control(), whole, tmp_path)
