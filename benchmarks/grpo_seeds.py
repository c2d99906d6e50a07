"""Runs GRPO's embedded task with three seeds and checks the README's claims about it. About ten minutes on 2 cores.

make bench          or          python benchmarks/grpo_seeds.py [OUTPUT_DIR]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
COLUMNS = {"accuracy_greedy": "greedy", "pass@1": "sampled", "pass@4": "pass@4", "pass@16": "pass@16"}


def main(output: Path) -> None:
    rows = []
    for seed in SEEDS:
        folder = output / f"seed-{seed}"
        start = time.perf_counter()
        command = [sys.executable, "recipes/grpo.py", "--config", "recipes/configs/grpo_embedded.yaml"]
        subprocess.run([*command, f"--output_dir={folder}", f"--seed={seed}", "--overwrite"], cwd=ROOT, check=True)
        results = json.loads((ROOT / folder / "results.json").read_text())
        rows.append((seed, results["SFT"], results["GRPO"], time.perf_counter() - start))
    print(f"\nheld-out accuracy, SFT -> GRPO\nseed   {''.join(f'{name:<18}' for name in COLUMNS.values())}seconds")
    for seed, sft, grpo, seconds in rows:
        cells = "".join(f"{f'{sft[key]:.1%} -> {grpo[key]:.1%}':<18}" for key in COLUMNS)
        print(f"{seed:<7}{cells}{seconds:.0f}")
    kept = {
        "sampled accuracy of SFT <= 60 % in each seed": all(sft["pass@1"] <= 0.6 for _, sft, _, _ in rows),
        "sampled accuracy of GRPO >= 95 % in each seed": all(grpo["pass@1"] >= 0.95 for _, _, grpo, _ in rows),
    }
    for promise, holds in kept.items():
        print(f"{'kept  ' if holds else 'BROKEN'} {promise}")
    sys.exit(0 if all(kept.values()) else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench-grpo"))
