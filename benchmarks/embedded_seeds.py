"""Runs the embedded pipeline with three seeds and checks the README's claims about it. About ten minutes on 2 cores.

make bench          or          python benchmarks/embedded_seeds.py [OUTPUT_DIR]
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def main(output: Path) -> None:
    rows = []
    for seed in SEEDS:
        folder = output / f"seed-{seed}"
        command = [sys.executable, "recipes/ppo_rlhf.py", "--config", "recipes/configs/ppo_embedded.yaml"]
        subprocess.run([*command, f"--output_dir={folder}", f"--seed={seed}", "--overwrite"], cwd=ROOT, check=True)
        results = json.loads((ROOT / folder / "results.json").read_text())
        rows.append((seed, results["SFT"], results["PPO"], results["reward_model"]["eval_accuracy"]))
    print("\nseed   RM accuracy   RM score        gold score      win rate   KL (nats)   length        distinct-2")
    for seed, sft, ppo, accuracy in rows:
        print(
            f"{seed:<7}{accuracy:<14.1%}{_arrow(sft, ppo, 'score'):<16}{_arrow(sft, ppo, 'rewards/gold/mean'):<16}"
            f"{ppo['win_rate']:<11.1%}{ppo['reward_kl']:<12.1f}{_arrow(sft, ppo, 'completion_length', 1):<14}"
            f"{_arrow(sft, ppo, 'distinct_2', 3)}"
        )
    kept = {
        "gold score rises in each seed": all(p["rewards/gold/mean"] > s["rewards/gold/mean"] for _, s, p, _ in rows),
        "win rate against SFT >= 75 % in each seed": all(p["win_rate"] >= 0.75 for _, _, p, _ in rows),
        "KL to the reference <= 20 nats in each seed": all(p["reward_kl"] <= 20 for _, _, p, _ in rows),
        "reward model between 65 % and 90 % on held-out pairs": all(0.65 <= accuracy <= 0.9 for *_, accuracy in rows),
    }
    for promise, holds in kept.items():
        print(f"{'kept  ' if holds else 'BROKEN'} {promise}")
    sys.exit(0 if all(kept.values()) else 1)


def _arrow(before: dict[str, float], after: dict[str, float], name: str, digits: int = 2) -> str:
    return f"{before[name]:.{digits}f} -> {after[name]:.{digits}f}"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench"))
