"""SIGTERM to what was started - torchrun, accelerate launch, or the program - ends the run after the step, saved."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.commands.cli import guard
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.trainers.ranks import two
from tests.trainers.test_rank_failure import left_in

ROOT = Path(__file__).parents[2]
STEPS = 12
LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0",
    "accelerate": "-m accelerate.commands.launch --config_file recipes/accelerate/cpu2.yaml --main_process_port 0",
    "accelerate, one process": "-m accelerate.commands.launch --cpu --num_processes 1",
}


def train(folder: Path, resume: bool) -> None:
    """Also what the launched processes run, in steps that a signal can hit."""

    def reward(completions, target, **_):
        time.sleep(0.0 if resume else 0.2)
        return tiny.count_target(completions, target)

    with contextlib.chdir(folder), guard():
        tiny.trainer("run", rewards=reward, total_steps=STEPS, checkpoint_every=100).train(resume=resume)


def resumed(rank: int, folder: Path) -> None:
    train(folder, True)


def uninterrupted(rank: int, folder: Path) -> None:
    train(folder, False)


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[] if name == "torchrun" else [pytest.mark.slow]) for name in LAUNCHERS]
)
def test_sigterm_to_the_launcher_ends_the_run_after_the_step_saved_and_it_resumes(launcher, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    parts.mkdir()
    whole.mkdir()
    command = [sys.executable, *LAUNCHERS[launcher].split(), str(Path(__file__)), str(parts)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = parts / "printed"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        metrics = parts / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2 and process.poll() is None, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    wait_for(lambda: "is saved: continue with resume" in log.read_text(), log)  # a lone one outlives its launcher
    done = len(read_metrics(parts / "run"))
    assert 2 <= done < STEPS and (parts / "run" / "checkpoints" / f"step-{done:06d}" / "MANIFEST.json").exists()

    if "one" in launcher:  # the saved line comes before the lock is released
        wait_for(lambda: not is_locked(parts / "run"), log)
        train(parts, True)
        train(whole, False)
    else:
        ended = [*two(tmp_path, resumed, parts), *two(tmp_path, uninterrupted, whole)]
        assert [rank.code for rank in ended] == [0, 0, 0, 0], ended
    files, expected = (left_in(folder / "run") for folder in (parts, whole))
    assert {name: data for name, data in files.items() if f"step-{done:06d}" not in name} == expected


def is_locked(run: Path) -> bool:
    with (run / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_for(condition, log: Path) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, log.read_text()[-3000:]
        time.sleep(0.05)


if __name__ == "__main__":
    train(Path(sys.argv[1]), False)
