"""Damaged files of a checkpoint in shards are named, and never taken for good ones."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.runs.checkpoint import MANIFEST
from rlhf.runs.directory import RunDirectory
from rlhf.runs.shards import write_shards
from tests.runs.content import assert_is_exactly, shares
from tests.runs.test_checkpoint import DAMAGE

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
