"""Files in shards that were edited and sealed anew are refused before anything is loaded."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.errors import InputError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.shards import StoredTensors, write_shards
from rlhf.types import Shard
from tests.one_house.test_damage import Watch, resealed
from tests.one_house.worlds import At, Breaks, Tokens, breaks
from tests.runs.shards.test_damage import OLD, of_the_other_process


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
