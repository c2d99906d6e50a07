"""One checkpoint on disk: its files and the manifest that vouches for them.

    step-000123/policy.safetensors, optimizer.safetensors, ...   one file per group of tensors
               /state.json                                       everything that is not a tensor
               /MANIFEST.json                                    written last: size and sha256 of every other file

Only safetensors and JSON are read, never a pickle: a checkpoint cannot run code.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import InputError, TrainingError
from rlhf.runs.files import beside, flush_directory, fsync

MANIFEST, STATE_FILE = "MANIFEST.json", "state.json"
FORMAT = {"format": "rlhf-toolkit checkpoint", "version": 2}
STEP_NAME = re.compile(r"step-(\d{6,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Saved:
    """The state of one part of a run: numbers and text that JSON gives back unchanged, and groups of named tensors."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Group -> name -> tensor; a group is a file of the checkpoint, so no two parts of a run share a name."""


class Part(Protocol):
    """A part of a run that checkpoints hold: the learner, the source."""

    def state(self, step: int) -> Saved | None:
        """What it takes to go on with step `step` when all before it are done; None if this part is elsewhere, such as in
        the middle of an update. Every process calls it."""
        ...

    def load(self, saved: Saved) -> None:
        """Go on from there."""
        ...


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are not, to the byte, those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. Tensors are read when asked for, so that no more than one group is in memory twice."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    files: frozenset[str]

    def tensors(self, group: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors saved under `group`, by name."""
        name = f"{group}.safetensors"
        if name not in self.files:  # a file that the manifest does not list was not verified
            raise InputError(f"{self.path} has no {name}: it was written by a run with other parts.")
        return load_file(self.path / name, device=str(device))

    def part(self, name: str) -> Saved:
        """What was saved of that part; its tensors are read when asked for."""
        if name not in self.state:
            raise InputError(f"{self.path} holds no {name!r}: it was written by a run with other parts.")
        return Saved(self.state[name], _Groups(self))


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """The groups of tensors of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        return self._checkpoint.tensors(group)

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".safetensors") for name in self._checkpoint.files if name.endswith(".safetensors"))

    def __len__(self) -> int:
        return len(list(iter(self)))


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify the manifest against itself and every file against it. Raises DamagedCheckpoint naming the bad file."""
    try:
        raw = (path / MANIFEST).read_bytes()
        body = {key: value for key, value in json.loads(raw).items() if key != "sha256"}
        if raw != _manifest_bytes(body):
            raise ValueError("its own checksum does not match")
        step, files, config = body["step"], body["files"], body["config"]
        if STATE_FILE not in files:
            raise ValueError(f"it does not list {STATE_FILE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is missing or damaged ({error})") from error
    found = {key: body.get(key) for key in FORMAT}
    if found != FORMAT:
        raise InputError(f"{path} has {found}, this version reads {FORMAT}. Use the version that wrote it.")
    if STEP_NAME.fullmatch(path.name) and path.name != step_name(step):
        raise DamagedCheckpoint(f"{path / MANIFEST} belongs to step {step}: the directory was renamed")
    for name, expected in files.items():
        file = path / name
        if not _PLAIN_NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing or not a plain file")
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} is not what was written (its size or sha256 differs)")
    return Checkpoint(path, step, json.loads((path / STATE_FILE).read_bytes()), config, frozenset(files))


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def write_files(path: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], text: str) -> None:
    """Fill the new directory `path` with everything but the manifest."""
    names = [f"{group}.safetensors" for group in tensors] + [STATE_FILE]
    bad = [name for name in names if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST or names.count(name) > 1]
    if bad:
        raise TrainingError(f"The checkpoint of step {step} cannot have files named {bad}.")
    path.mkdir()
    for group, named in tensors.items():
        save_file(_own_storages(named), path / f"{group}.safetensors")
    write_file(path / STATE_FILE, text.encode())


def seal(path: Path, step: int, config: Mapping[str, Any]) -> None:
    """Flush every file of `path` to the disk, then write the manifest over them, last."""
    flush_directory(path)
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in path.iterdir()}
    write_file(path / MANIFEST, _manifest_bytes({**FORMAT, "step": step, "files": files, "config": config}))
    fsync(path)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The one byte string that is a valid manifest of this content: it carries the sha256 of itself without it."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1, default=str).encode() + b"\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_storages(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, no two on one storage (tied weights), as safetensors wants them."""
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


def discard(path: Path) -> None:
    """Delete a checkpoint of ours. What has no manifest may be a user's: it is only moved out of the way."""
    if not (path / MANIFEST).is_file():
        return set_aside(path)
    temporary = beside(path)  # half deleted, it must not look like a checkpoint
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def set_aside(path: Path) -> None:
    """Rename to a name that is never read as a checkpoint, so that its step can be written again."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    os.rename(path, next(name for name in names if not os.path.lexists(name)))
