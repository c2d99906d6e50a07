"""A run of two processes that is copied by every test."""

from pathlib import Path

import pytest

from rlhf.runs.directory import RunDirectory
from tests.runs.shards.pair import save, two


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run that holds the checkpoints of steps 1 and 2, in shards."""
    path = tmp_path_factory.mktemp("template") / "run"

    def work(run: RunDirectory) -> None:
        save(run, 1)
        save(run, 2)

    assert two(path, work, resume=False) == [0, 0]
    return path
