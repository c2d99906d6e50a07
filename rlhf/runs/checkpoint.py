"""One checkpoint on disk: its files, and the manifest with which they are verified.

    step-000123/policy.safetensors, optimizer.safetensors, ...   per group of tensors; shards.py
               /state.json                                       everything that is not a tensor
               /MANIFEST.json                                    written last: size and sha256 of every other file

Only safetensors and JSON are read, never a pickle, so loading a checkpoint cannot run code.
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
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from rlhf.errors import InputError, TrainingError, excerpt
from rlhf.runs.files import beside, disk_errors, flush_directory, fsync
from rlhf.runs.shards import StoredTensors, groups_of, write_whole

MANIFEST, STATE_FILE = "MANIFEST.json", "state.json"
FORMAT = {"format": "rlhf-toolkit checkpoint", "version": 3}
ANOTHER = "Resume from another checkpoint."
STEP_NAME = re.compile(r"step-(\d{6,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Saved:
    """The state of one part of a run: values that survive a round trip through JSON, and groups of named tensors."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Group -> name -> tensor, or `Shard`, this process's rows of it; what is loaded is whole. Each group has files of its
    own in the checkpoint, so parts of a run must not share group names."""

    def value(self, name: str, kind: type) -> Any:
        """`values[name]`. Raises InputError unless it is of that type: someone may have edited the checkpoint."""
        found = self.values.get(name)
        if type(found) is not kind:
            raise InputError(f"{STATE_FILE}: {name} is {excerpt(found)}, not of type {kind.__name__}. {ANOTHER}")
        return found

    def count(self, name: str) -> int:
        """`values[name]`, a whole number from 0 on; InputError if it is anything else."""
        if (found := self.value(name, int)) < 0:
            raise InputError(f"{STATE_FILE}: {name} is {found}, below 0. {ANOTHER}")
        return found


class Part(Protocol):
    """A part of a run whose state is saved in checkpoints: the learner, the source."""

    def state(self, step: int) -> Saved | None:
        """The state from which to continue with step `step`, after all earlier steps; None if this part is not at that
        point, for example in the middle of an update. Every process calls it."""
        ...

    def load(self, saved: Saved) -> None:
        """Restore the state. A part may also have `check(saved, step)`, which raises InputError if it is not the state
        after `step` steps; it is called before any part is loaded."""
        ...


class DamagedCheckpoint(InputError):
    """A checkpoint whose files differ from those that were written, or are missing."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. Tensors are read on demand, so that at most one group is in memory twice."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    files: frozenset[str]

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """The tensors saved under `group`, by name."""
        files = groups_of(sorted(self.files)).get(group)
        if files is None:  # a file that the manifest does not list was not verified
            raise InputError(
                f"{self.path} has no {group}.safetensors: it belongs to another kind of run. Resume from one of this kind."
            )
        return StoredTensors([self.path / name for name in files], ANOTHER)

    def part(self, name: str) -> Saved:
        """The saved state of the part `name`; its tensors are read on demand."""
        if not isinstance(self.state.get(name), dict):
            raise InputError(
                f"{self.path} has no {name!r}: it belongs to another kind of run. Resume from one of this kind."
            )
        return Saved(self.state[name], _Groups(self))


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """The groups of tensors of a checkpoint, by name; each is read on demand."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, group: str) -> Mapping[str, Tensor]:
        return self._checkpoint.tensors(group)

    def __iter__(self) -> Iterator[str]:
        return iter(groups_of(sorted(self._checkpoint.files)))

    def __len__(self) -> int:
        return len(list(iter(self)))


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify the manifest's own checksum, then every file against the manifest.

    Raises DamagedCheckpoint, naming the bad file, or InputError if another version wrote the checkpoint.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        body = {key: value for key, value in json.loads(raw).items() if key != "sha256"}
        if raw != _manifest_bytes(body):
            raise ValueError("its own checksum does not match")
        found = {key: body.get(key) for key in FORMAT}
        if found != FORMAT:
            raise InputError(f"{path} has {found}, this version reads {FORMAT}. Use the version that wrote it.")
        step, config = body["step"], body["config"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in body["files"].items()}
        if type(step) is not int or not isinstance(config, dict) or STATE_FILE not in files:
            raise ValueError(f"it does not list {STATE_FILE}, a step and a config")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is missing or damaged ({error})") from error
    if STEP_NAME.fullmatch(path.name) and path.name != step_name(step):
        raise DamagedCheckpoint(f"{path / MANIFEST} belongs to step {step}: its directory was renamed")
    for name, expected in files.items():
        file = path / name
        if not _PLAIN_NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing or not a plain file")
        with disk_errors(f"{file} cannot be read", ANOTHER, kind=DamagedCheckpoint):
            if (file.stat().st_size, _sha256(file)) != expected:
                raise DamagedCheckpoint(f"{file} differs from the file that was written (in size or sha256)")
    return Checkpoint(path, step, _state(path / STATE_FILE), config, frozenset(files))


def _state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is no JSON of named parts ({error})") from error


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def write_files(path: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], text: str) -> None:
    """Create the directory `path` and write all files of the checkpoint except the manifest."""
    names = [f"{group}.safetensors" for group in tensors] + [STATE_FILE]
    bad = [name for name in names if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST or names.count(name) > 1]
    if bad:
        raise TrainingError(f"The checkpoint of step {step} cannot have files named {bad}.")
    path.mkdir()
    for group, named in tensors.items():
        write_whole(path, group, named)
    write_file(path / STATE_FILE, text.encode())


Described: TypeAlias = dict[str, dict[str, Any]]
"""File name -> its size and sha256."""


def described(file: Path) -> Described:
    """The file's entry in a manifest."""
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}}


def seal(path: Path, step: int, config: Mapping[str, Any], known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Flush every file in `path` to disk, then write the manifest that lists them. known: entries made already."""
    flush_directory(path)
    files = dict(known or {})
    for file in path.iterdir():
        files |= {} if file.name in files else described(file)
    write_file(path / MANIFEST, _manifest_bytes({**FORMAT, "step": step, "files": files, "config": config}))
    fsync(path)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The manifest as bytes. It contains the sha256 of `body`; equal content always gives equal bytes."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1, default=str).encode() + b"\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Delete a checkpoint. A directory without a manifest may belong to the user, so it is only renamed."""
    if not (path / MANIFEST).is_file():
        return set_aside(path)
    temporary = beside(path)  # half deleted, it must not be taken for a checkpoint
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def set_aside(path: Path) -> None:
    """Rename the directory so that it is never read as a checkpoint, and its step can be written again."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    os.rename(path, next(name for name in names if not os.path.lexists(name)))
