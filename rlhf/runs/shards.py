"""The tensors of a checkpoint: in one file, or in one per process, and read one at a time by any number of processes.

    policy.safetensors                   whole tensors
    policy.00001-of-00002.safetensors    the rows of each tensor that the first of two processes holds; the header says
                                         which is the first of them (of a tensor that it does not name: the whole is here)

No process ever holds more than its own rows and one whole tensor.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import InputError
from rlhf.runs.files import disk_errors
from rlhf.types import Shard

FILE = re.compile(r"(?P<group>.+?)(\.(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors")


Stored: TypeAlias = Mapping[str, Tensor | Shard]
"""Name -> what this process writes of the tensor."""


def is_sharded(named: Stored) -> bool:
    return any(isinstance(value, Shard) for value in named.values())


def write_whole(folder: Path, group: str, named: Mapping[str, Tensor]) -> Path:
    """Write one file of whole tensors."""
    file = folder / f"{group}.safetensors"
    save_file(_own_storages(named), file)
    return file


def write_shards(folder: Path, group: str, named: Stored, rank: int, processes: int) -> Path:
    """Write this process's file of the group. A tensor that is no `Shard` is whole: one process alone has it."""
    file = folder / f"{group}.{rank + 1:05d}-of-{processes:05d}.safetensors"
    firsts = {name: value.first for name, value in named.items() if isinstance(value, Shard)}
    tensors = {name: value.rows if isinstance(value, Shard) else value for name, value in named.items()}
    save_file(_own_storages(tensors), file, metadata={"first_rows": json.dumps(firsts)})
    return file


def groups_of(files: Sequence[str]) -> dict[str, list[str]]:
    """Group -> names of its files, from the names of all files of a checkpoint."""
    groups: dict[str, list[str]] = {}
    for name in sorted(files):
        if match := FILE.fullmatch(name):
            groups.setdefault(match["group"], []).append(name)
    return groups


@dataclass(frozen=True)
class _Piece:
    """What one file holds of a tensor."""

    file: Path
    opened: Any
    name: str
    first: int | None
    """Index of its first row; None: it is the whole tensor."""

    @property
    def shape(self) -> list[int]:
        return self.opened.get_slice(self.name).get_shape()

    @property
    def kind(self) -> tuple[str, list[int]]:
        """Type, and shape of a row: what all pieces of a tensor have in common."""
        return self.opened.get_slice(self.name).get_dtype(), self.shape[1:]

    def read(self) -> Tensor:
        return self.opened.get_tensor(self.name)


class StoredTensors(Mapping[str, Tensor]):
    """The whole tensors of a group by name, on the CPU; each is read when it is asked for.

    Raises InputError, before any is read, for files that do not fit together.
    """

    def __init__(self, files: Sequence[Path], remedy: str) -> None:
        self._remedy = remedy
        self._pieces: dict[str, list[_Piece]] = {}
        self._refuse(_missing(files))
        for file in files:
            with disk_errors(f"{file} cannot be read", remedy, kind=InputError):
                opened = safe_open(file, framework="pt")
                firsts = _first_rows(opened)
                if firsts is None:
                    return self._refuse(f"{file}: its first_rows are no numbers of rows")
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    self._pieces.setdefault(name, []).append(_Piece(file, opened, name, firsts.get(name)))
        for pieces in self._pieces.values():
            self._refuse(_gap(pieces, files))

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise InputError(f"{problem}. {self._remedy}")

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        with disk_errors(f"{pieces[0].file} cannot be read", self._remedy, kind=InputError):
            parts = [piece.read() for piece in pieces]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _missing(files: Sequence[Path]) -> str | None:
    """What is wrong if these are not all files of one group, in the order of processes."""
    found = [file.name for file in files]
    wanted = found[:1]
    match = FILE.fullmatch(found[0])
    if match and match["count"]:
        numbers = range(1, int(match["count"]) + 1)
        wanted = [f"{match['group']}.{number:05d}-of-{match['count']}.safetensors" for number in numbers]
    if found == wanted:
        return None
    return f"{files[0].parent} has {', '.join(found)}, not one file of each process that wrote the group"


def _first_rows(opened: Any) -> dict[str, int] | None:
    """Name -> index of the first row, of the tensors that are in shards; None if the header is wrong."""
    try:
        firsts = json.loads((opened.metadata() or {}).get("first_rows", "{}"))
    except (ValueError, RecursionError):
        return None
    counts = isinstance(firsts, dict) and all(type(first) is int and first >= 0 for first in firsts.values())
    return firsts if counts else None


def _gap(pieces: Sequence[_Piece], files: Sequence[Path]) -> str | None:
    """What is wrong if these pieces are not the whole tensor: each process has the rows that follow those of the last."""
    if len(pieces) == 1 and pieces[0].first is None:
        return None
    if len(pieces) < len(files):
        return f"{pieces[0].file}: {pieces[0].name} is not in the files of all processes"
    end = 0
    for piece in pieces:
        if piece.first != end or not piece.shape:
            found = "the whole of" if piece.first is None else f"row {piece.first} and the following ones of"
            return f"{piece.file} holds {found} {piece.name}, where row {end} should follow"
        if piece.kind != pieces[0].kind:
            return f"{piece.file}: the rows of {piece.name} are of another type or shape than in {pieces[0].file.name}"
        end += piece.shape[0]
    return None


def _own_storages(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, no two sharing storage (tied weights would), as safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result
