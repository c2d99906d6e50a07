"""Runs the fast tests with each supported Python that is installed, and with the oldest packages that are accepted.

    python -m tests.pythons [3.11 3.12 3.13 lowest] [-- pytest arguments]        (`make test-python`)

Each gets a virtual environment of its own under .venvs/, kept for the next time. "lowest" turns each `>=` of
pyproject.toml into `==`, with the oldest Python; what these packages need themselves is as new as they allow.
"""

import glob
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
LOWEST = "lowest"
SHOW_VERSIONS = """
import sys
from importlib.metadata import version
packages = ("torch", "transformers", "accelerate", "datasets", "numpy", "gymnasium")
print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in packages), sep=", ")
"""
EXTRAS = "gym,box2d,mujoco,atari,envpool,video,peers,plots,math,tracking,dev"


def interpreter(version: str) -> str | None:
    """python3.12 from the PATH or from pyenv."""
    installed = sorted(glob.glob(str(Path.home() / f".pyenv/versions/{version}.*/bin/python")))
    for candidate in (shutil.which(f"python{version}"), *installed):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    return None


def lower_bounds() -> str:
    """Constraints: the lowest version of every package that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"]]
    for extra in EXTRAS.split(","):
        named += project["optional-dependencies"][extra]
    lowest = {}
    for requirement in map(Requirement, named):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        lowest[requirement.name] = max(bound, lowest.get(requirement.name, bound), key=Version)
    return "".join(f"{name}=={version}\n" for name, version in lowest.items())


def prepared(name: str) -> str | None:
    """The Python of `name`'s environment, with everything installed; None if there is no such interpreter."""
    base = interpreter(PYTHONS[0] if name == LOWEST else name)
    if base is None:
        return None
    folder = ROOT / ".venvs" / name
    python = str(folder / "bin/python")
    constraints = ROOT / "constraints.txt"
    if name == LOWEST:
        constraints = ROOT / ".venvs/lowest.txt"
        constraints.parent.mkdir(exist_ok=True)
        constraints.write_text(lower_bounds())
    if not folder.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", constraints, "-e", f".[{EXTRAS}]"], cwd=ROOT, check=True
    )
    return python


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    results = {}
    for name in arguments[:cut] or (*PYTHONS, LOWEST):
        print(f"\n== {name}", flush=True)
        python = prepared(name)
        if python is None:
            results[name] = "not installed here"
            continue
        subprocess.run([python, "-c", SHOW_VERSIONS], check=True)
        tests = subprocess.run([python, "-m", "pytest", "-n", "2", "-m", "not slow", *arguments[cut + 1 :]], cwd=ROOT)
        results[name] = "passed" if tests.returncode == 0 else "FAILED"
    print(f"\n{', '.join(f'{name}: {result}' for name, result in results.items())}")
    return 1 if "FAILED" in results.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
