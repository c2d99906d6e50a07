"""Runs the tests that compare floats as other CPUs would run them, and shows how much of each tolerance was used.

    python -m tests.any_cpu [pytest arguments]        (`make test-isa`)

PyTorch's kernels, oneDNN and MKL each choose their instructions by the CPU, and the number of threads decides how sums are
split; each choice rounds differently, and each variant below forces some. The command fails if a test fails, or if a
comparison uses more than 1/HEADROOM of its tolerance: it would fail sooner or later on a machine that nobody here has.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HEADROOM = 8
"""How many times the largest rounding error seen in any variant must fit into the tolerance."""

SHOWN = 20
"""How many of the closest comparisons are printed."""

VARIANTS = {
    "this CPU's own instructions": {},
    "own, with older libraries, two threads": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "RLHF_TEST_THREADS": "2",
    },
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "AVX2, MKL compatible, two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "COMPATIBLE",
        "RLHF_TEST_THREADS": "2",
    },
    "no vectors, SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "no vectors, two threads": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "RLHF_TEST_THREADS": "2",
    },
}
"""Environment variables of each run."""


def run(variant: str, folder: Path, first: Path, arguments: list[str]) -> bool:
    """Runs the marked tests under one variant, with the shares of tolerances used written to `folder`. True if all pass."""
    settings = dict(VARIANTS[variant])
    if "RLHF_TEST_THREADS" in settings:  # slower on tiny tensors: only the tests that compared floats in the first run
        settings["RLHF_ROUNDING_OF"] = str(first)
    print(
        f"\n== {variant}: {' '.join(f'{name}={value}' for name, value in settings.items()) or 'nothing forced'}",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "tests.rounding",
        "-m",
        "rounding and not slow",
        *arguments,
    ]
    return subprocess.run(command, env={**os.environ, **settings, "RLHF_ROUNDING": str(folder)}).returncode == 0


def closest(folders: dict[str, Path]) -> list[dict]:
    """For each test, the comparison that used most of its tolerance in any variant; the closest first."""
    worst: dict[str, dict] = {}
    for variant, folder in folders.items():
        for file in folder.glob("*.json"):
            for test, used in json.loads(file.read_text()).items():
                if test not in worst or used["share"] > worst[test]["share"]:
                    worst[test] = {**used, "test": test, "variant": variant}
    return sorted(worst.values(), key=lambda used: -used["share"])


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as root:
        folders = {variant: Path(root, str(index)) for index, variant in enumerate(VARIANTS)}
        failed = [
            variant for variant, folder in folders.items() if not run(variant, folder, Path(root, "0"), arguments)
        ]
        used = closest(folders)
    print(f"\n{len(used)} tests compare floats up to rounding. Those that came closest to their tolerance:")
    for row in used[:SHOWN]:
        seen = f"{row['share']:6.1%}  {row['error']:.1e} of {row['allowed']:.1e}"
        print(f"  {seen}  {row['test']}, line {row['line']} ({row['variant']})")
    near = [row for row in used if row["share"] > 1 / HEADROOM]
    print(f"{len(near)} tests have less than {HEADROOM} times headroom.")
    print(f"Tests failed under: {', '.join(failed)}." if failed else "All variants passed.")
    return 1 if near or failed or not used else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
