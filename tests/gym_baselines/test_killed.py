"""A control run that is killed anywhere and resumed leaves the same bytes. This file is also the program that gets killed.

How it is killed is in tests/trainers/test_interruption.py.
"""

import os
import sys
from pathlib import Path

import pytest

import gym_baselines
from gym_baselines import preset
from gym_baselines.agent import AGENT_FILE, WEIGHTS_FILE
from gym_baselines.config import with_settings
from gym_baselines.source import EnvironmentSource
from gym_baselines.train import Training
from tests.trainers import test_interruption as interruption

MODULE = "tests.gym_baselines.test_killed"


def results(output_dir: Path) -> dict[str, bytes]:
    """The bytes of everything a finished run leaves; seconds, and what names the settings, aside."""
    last = max((output_dir / "checkpoints").glob("step-*"))
    files = [output_dir / name for name in ("metrics.jsonl", WEIGHTS_FILE, AGENT_FILE)]
    files += [file for file in sorted(last.iterdir()) if file.name != "MANIFEST.json"]
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


def train_or_resume(output_dir: Path) -> None:
    """Seven steps, saved about every second one; some episodes span several."""
    config = preset(
        "CartPole-v1",
        "ppo_penalty",
        num_envs=4,
        rollout_steps=8,
        total_steps=190,
        num_epochs=2,
        minibatch_size=None,
        lr_schedule="linear",
        normalize_observations=True,
        checkpoint_every=64,
        progress_bar=False,
        output_dir=str(output_dir),
    )
    training = Training(with_settings(config, resume=(output_dir / "RUN.json").exists()))
    try:
        training.train()
    finally:
        training.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    train_or_resume(out)
    assert 4 <= (out / "metrics.jsonl").read_bytes().count(b"\n") <= 8
    return results(out)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_places_and_twenty_times_and_resumed_leaves_the_same_bytes(whole, tmp_path):
    interruption.killed_and_resumed(MODULE, tmp_path, 100, whole, timed=20, results=results)


@pytest.mark.slow
def test_the_comparison_notices_environments_that_are_not_restored(whole, tmp_path, monkeypatch):
    """Negative control, with places enough to be behind the first checkpoint."""
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(AssertionError):
        interruption.killed_and_resumed(MODULE, tmp_path, 4, whole, results=results)


def break_resume() -> None:
    """A resumed run has its weights, and environments that start anew."""
    EnvironmentSource.load = lambda self, saved: self.__dict__.update(rollouts=saved.values["rollouts"])


def main(out: Path, kills: int, timed: int) -> None:
    if os.environ.get("BROKEN"):
        break_resume()
    interruption.train_or_resume = train_or_resume
    interruption.PACKAGE = (str(interruption.PACKAGE), str(Path(gym_baselines.__file__).parent))
    interruption.main(out, kills, timed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
