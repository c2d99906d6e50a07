"""The tensors of a checkpoint: in one file, or in one per process, and read one at a time by any number of processes.

    policy.safetensors                   whole tensors
    policy.00001-of-00002.safetensors    the rows of each tensor that the first of two processes holds; the header says
                                         which is the first of them

No process ever holds more than its own rows and one whole tensor.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
    firsts = {name: value.first if isinstance(value, Shard) else 0 for name, value in named.items()}
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


class StoredTensors(Mapping[str, Tensor]):
    """The whole tensors of a group by name, on the CPU; each is read when it is asked for.

    Raises InputError for files that do not fit together.
    """

    def __init__(self, files: Sequence[Path], remedy: str) -> None:
        self._remedy = remedy
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            with disk_errors(f"{file} cannot be read", remedy, kind=InputError):
                opened = safe_open(file, framework="pt")
                firsts = json.loads((opened.metadata() or {}).get("first_rows", "{}"))
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    self._pieces.setdefault(name, []).append((int(firsts.get(name, 0)), opened))
        self._files = [file.name for file in files]

    def __getitem__(self, name: str) -> Tensor:
        parts, end = [], 0
        for first, opened in sorted(self._pieces[name], key=lambda piece: piece[0]):
            with disk_errors(f"{', '.join(self._files)} cannot be read", self._remedy, kind=InputError):
                part = opened.get_tensor(name)
            if first == end or (part.dim() and not len(part)):
                parts.append(part)
                end += len(part) if part.dim() else 1
            else:
                raise InputError(
                    f"{', '.join(self._files)}: rows {end} to {first - 1} of {name} are missing. {self._remedy}"
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


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
