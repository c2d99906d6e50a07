"""Runs measured jobs, each in its own process and several at a time, and keeps every result as a JSON file.

Stored results are not computed again, so an interrupted call continues with the missing ones.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gym_baselines.measuring.measure import key_of
from gym_baselines.measuring.meter import RunSpec
from rlhf.errors import InputError, TrainingError

RUNS_FOLDER = "runs"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Job:
    """A named run, whose result is stored in `FOLDER/runs/NAME.json`."""

    name: str
    spec: RunSpec
    task: str = "run"
    """The task of measure.py: "run" or "lines"."""


def run_jobs(
    jobs: Sequence[Job], folder: str | Path, *, workers: int, overwrite: bool, description: str
) -> dict[str, dict[str, Any]]:
    """Do the jobs whose results are missing, and read all results.

    Args:
        jobs: What to run.
        folder: The results go to its subfolder `runs`.
        workers: How many processes run at the same time.
        overwrite: Run all jobs, even those with stored results.
        description: Label of the progress bar.

    Returns:
        Name -> result of every job.

    Raises:
        InputError: A run refused its settings, or a stored result has other settings, since these are never mixed.
        TrainingError: A run failed.
    """
    folder = Path(folder) / RUNS_FOLDER
    missing = [job for job in jobs if overwrite or not _stored(job, folder)]
    total = sum(job.spec.total_steps for job in missing if job.task == "run")
    kept = len(jobs) - len(missing)
    if kept:
        print(f"{kept} of {len(jobs)} results are in {folder} already; --overwrite true measures them again.")
    with tqdm(total=total, unit=" steps", desc=description, disable=not missing) as bar:
        children: list[subprocess.Popen[str]] = []
        pool = ThreadPoolExecutor(workers)
        try:
            waiting = [pool.submit(_run, job, folder, bar, children) for job in missing]
            for one in waiting:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
        finally:
            pool.shutdown()
    return {job.name: read_result(folder / f"{job.name}.json") for job in jobs}


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict):
            raise ValueError("it holds no result")
        return result
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Delete it: it will be measured again.") from error


def _stored(job: Job, folder: Path) -> bool:
    path = folder / f"{job.name}.json"
    if not path.exists():
        return False
    stored, wanted = read_result(path), key_of(job.spec)
    differ = [name for group in wanted for name in _differences(wanted[group], stored.get(group), group)]
    if differ:
        raise InputError(
            f"{path} was measured with other settings ({', '.join(differ)}). Name another output_dir, or measure again "
            "with --overwrite true."
        )
    return True


def _differences(wanted: Any, stored: Any, name: str) -> list[str]:
    """Dotted names of the settings that differ."""
    if not isinstance(wanted, dict) or not isinstance(stored, dict):
        return [] if wanted == stored else [name]
    keys = {**wanted, **stored}
    return [found for key in keys for found in _differences(wanted.get(key), stored.get(key), f"{name}.{key}")]


def _run(job: Job, folder: Path, bar: tqdm, children: list[subprocess.Popen[str]]) -> None:
    """Do a job in a child process, and advance the bar by the progress lines that it prints."""
    path = folder / f"{job.name}.json"
    command = [
        sys.executable,
        "-m",
        "gym_baselines.measuring.measure",
        job.task,
        json.dumps(asdict(job.spec)),
        str(path),
    ]
    paths = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
    )
    children.append(child)
    assert child.stdout is not None and child.stderr is not None
    with ThreadPoolExecutor(1) as reader:  # read stderr too: a full pipe would block the child
        errors = reader.submit(child.stderr.read)
        done = 0
        for line in child.stdout:
            facts = _progress(line)
            if facts is not None:
                bar.set_postfix_str(f"{job.name}: return {facts['mean']:.1f}", refresh=False)
                steps = min(facts["steps"], job.spec.total_steps)  # the last rollout may go beyond total_steps
                bar.update(steps - done)
                done = steps
        status, message = child.wait(), errors.result().strip()
    if status != 0:
        kind = InputError if status == 2 else TrainingError
        raise kind(f"{job.name}: {_last_line(message, status)}")


def _progress(line: str) -> dict[str, Any] | None:
    try:
        facts = json.loads(line)
    except ValueError:
        return None  # something else that a library printed
    return facts if isinstance(facts, dict) and {"steps", "mean"} <= facts.keys() else None


def _last_line(message: str, status: int) -> str:
    lines = message.splitlines() or [f"its process ended with status {status}."]
    return lines[-1].removeprefix("error: ").removeprefix("stopped: ")
