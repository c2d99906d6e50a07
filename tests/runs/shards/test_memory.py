"""Gathering and reading hold one whole tensor at a time."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from rlhf.layout import FullySharded
from rlhf.runs.shards import write_shards
from rlhf.types import Shard

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
