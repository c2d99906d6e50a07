"""`make gpu` in its CPU form, with a Python that has torch, transformers and accelerate alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = ("datasets", "gymnasium", "jsonargparse", "matplotlib", "tensorboard", "stable_baselines3", "trl")
HIDE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
@staticmethod
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def test_every_stage_runs_without_datasets_gymnasium_and_jsonargparse_and_says_that_no_gpu_was_seen(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    settings = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("NOTHING OF CUDA WAS SEEN") == 2
    assert "BROKEN" not in done.stdout and done.stdout.count(" learns") == 8
    assert "a resumed run ends with the same bits" in done.stdout
    assert done.stdout.count("tokens/s") == 4 and done.stdout.count("peak memory") == 4
    results = "float32 passed, bfloat16 passed, process-group passed, shards passed, adapters passed"
    assert f"\n{results}, control SKIPPED, speed-float32 passed, speed-bfloat16 passed\n" in done.stdout
    assert "Gymnasium is not installed" in done.stdout


def test_the_control_stage_learns_cartpole_where_gymnasium_is_installed():
    pytest.importorskip("gymnasium")
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "control"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok     the mean return of 10 episodes" in done.stdout and "control passed" in done.stdout
