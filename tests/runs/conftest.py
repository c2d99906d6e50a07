"""A run's directory without waiting for the disk."""

import os

import pytest

from rlhf.runs.directory import RunDirectory


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Flushing matters when the power fails, which no test can show; that it is called in order, one test does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run", keep=2)
    run.open()
    yield run
    run.close()
