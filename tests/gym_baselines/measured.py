"""Results of runs written by hand, and runs made in this process, for the tests of `compare` and `plot`."""

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

from gym_baselines.measuring import jobs, measure


def result(means, *, every=1000, cpu_s=1.0, kls=(), series=None, last=(0.0, 1.0), peak_mib=100, wall_s=2.0):
    """A run whose k-th evaluation, after k * every steps and k * cpu_s seconds, gave means[k - 1]."""
    evaluations = [
        {"steps": k * every, "cpu_s": k * cpu_s, "wall_s": k * wall_s, "mean": mean, "std": 0.0, "episodes": 5}
        for k, mean in enumerate(means, 1)
    ]
    return {
        "evaluations": evaluations,
        "steps": len(means) * every,
        "cpu_s": len(means) * cpu_s,
        "wall_s": len(means) * wall_s,
        "peak_memory_bytes": peak_mib * 2**20,
        "kl_per_update": list(kls),
        "series": series or {},
        "last_returns": list(last),
    }


def run_here(monkeypatch, made=None):
    """Let jobs run in this process (a new one takes seconds to start), or be made by `made(job)`. Gives the names run."""
    ran = []

    def run(job, folder, bar, children):
        ran.append(job.name)
        path = folder / f"{job.name}.json"
        if made is not None:
            measure.write_json(path, measure.key_of(job.spec) | made(job))
            return
        with redirect_stdout(io.StringIO()):
            measure.main(job.task, json.dumps(asdict(job.spec)), str(path))

    monkeypatch.setattr(jobs, "_run", run)
    return ran


class NoPackage:
    """Imports of `name` fail, as where it is not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)
        return None


def without_package(monkeypatch, name):
    for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [NoPackage(name), *sys.meta_path])
