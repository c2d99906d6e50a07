"""Runs the same short jobs in two checkouts and compares the files they write: a refactoring must not change a byte.

    git worktree add /tmp/before HEAD~1
    python benchmarks/compare_checkouts.py /tmp/before . [--only control] [--output /tmp/compared]

Each job is a list of commands, run with the interpreter of this script and the packages of the checkout, on one thread.
Metrics, completions, results, weights and agents are compared; timings, settings and logs are not. If JSON lines gain
or lose keys but agree in all others, the report says so, and the reader decides whether that was intended. Takes about
six minutes per checkout on two cores, most of them for the embedded models. A checkout that has not changed since its
last run into the same --output is not run again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

COMPARED = ("metrics.jsonl", "completions.jsonl", "agent.json", "results.json", "*.safetensors")
LATE = ("checkpoints",)
"""Folders that are not compared, because their layout may change; the exported weights are compared instead."""

PPO = ["recipes/ppo_rlhf.py", "--config", "recipes/configs/ppo_embedded.yaml", "--total_steps", "4"]
GRPO = ["recipes/grpo.py", "--config", "recipes/configs/grpo_embedded.yaml", "--total_steps", "4"]
SMALL = ["--generation.max_new_tokens", "24", "--lr_schedule", "constant", "--learning_rate", "1e-3"]
TUNED = [*SMALL, "--prompts_per_step", "12", "--checkpoint_every", "2"]
OWN_PPO = [
    "recipes/ppo_rlhf.py",
    "--policy",
    "{out}/ppo/sft",
    "--dataset",
    "{out}/ppo/data/prompts_train.jsonl",
    *TUNED,
]
OWN_PPO += ["--reward_model", "{out}/ppo/reward_model", "--ppo.kl_target", "4", "--ppo.entropy_coef", "0.01"]
OWN_PPO += ["--update.minibatch_size", "6", "--update.microbatch_tokens", "200"]
OWN_GRPO = ["recipes/grpo.py", "--policy", "{out}/grpo/sft", "--dataset", "{out}/grpo/data/prompts_train.jsonl", *TUNED]
OWN_GRPO += ["--reward", "rlhf.verifiers:exact_match", "--grpo.completions_per_prompt", "4"]
DYNAMIC = [*OWN_GRPO, "--grpo.dynamic_sampling_rounds", "3", "--update.minibatch_size", "12"]
TWO_LM = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml"]
TWO = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--rdzv_backend",
    "c10d",
    "--rdzv_endpoint",
    "localhost:0",
]
CONTROL = ["-m", "gym_baselines", "train", "--progress_bar", "false", "--final_episodes", "2"]
CARTPOLE = [*CONTROL, "--env", "CartPole-v1", "--total_steps", "3000"]
HOPPER = [*CONTROL, "--env", "Hopper-v5", "--num_envs", "2", "--rollout_steps", "256", "--normalize_rewards", "true"]
HOPPER += ["--network.normalize_observations", "true"]

COMPILED = """import sys
from gym_baselines import PPO
PPO("CartPole-v1", compile=True, output_dir=sys.argv[1], progress_bar=False).learn(3000)"""

JOBS: dict[str, list[list[str]]] = {
    "ppo": [[*PPO, "--output_dir", "{out}/ppo"]],
    "grpo": [[*GRPO, "--output_dir", "{out}/grpo"]],
    "ppo-own": [[*OWN_PPO, "--total_steps", "4", "--output_dir", "{out}/ppo-own"]],
    "ppo-resumed": [
        [*OWN_PPO, "--total_steps", "2", "--output_dir", "{out}/ppo-resumed"],
        [*OWN_PPO, "--total_steps", "4", "--resume", "--output_dir", "{out}/ppo-resumed"],
    ],
    "ppo-two-processes": [[*TWO_LM, *OWN_PPO, "--total_steps", "3", "--output_dir", "{out}/ppo-two-processes"]],
    **{
        f"grpo-{preset}": [
            [*OWN_GRPO, "--preset", preset, "--total_steps", "2", "--output_dir", f"{{out}}/grpo-{preset}"]
        ]
        for preset in ("grpo", "gspo", "cispo", "rloo", "reinforce_pp")
    },
    "grpo-dynamic": [
        [*DYNAMIC, "--total_steps", "2", "--output_dir", "{out}/grpo-dynamic"],
        [*DYNAMIC, "--total_steps", "4", "--resume", "--output_dir", "{out}/grpo-dynamic"],
    ],
    **{
        f"control-{name}": [[*CARTPOLE, "--algorithm", name, "--output_dir", f"{{out}}/control-{name}"]]
        for name in ("ppo", "ppo_penalty", "a2c", "reinforce", "trpo")
    },
    "control-resumed": [
        [*CARTPOLE, "--algorithm", "ppo", "--output_dir", "{out}/control-resumed"],
        [*CARTPOLE, "--algorithm", "ppo", "--total_steps", "6000", "--resume", "--output_dir", "{out}/control-resumed"],
    ],
    "control-hopper": [[*HOPPER, "--total_steps", "4096", "--output_dir", "{out}/control-hopper"]],
    "control-compiled": [["-c", COMPILED, "{out}/control-compiled"]],
    "control-two-processes": [[*TWO, *CARTPOLE, "--output_dir", "{out}/control-two-processes"]],
}
"""Name -> commands; `{out}` is the folder for the checkout's results. Later jobs use the models of `ppo` and `grpo`."""


def run(checkout: Path, out: Path, only: str) -> None:
    """Run the jobs chosen by `only`, and those whose models they need, in `checkout`; write results below `out`."""
    stamp = content_of(checkout) + only
    mark = out / "checkout.txt"
    if mark.is_file() and mark.read_text() == stamp:
        print(f"{checkout}: unchanged since {out} was made", flush=True)
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **single, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    for name, commands in JOBS.items():
        if not name.startswith(only) and not (name in ("ppo", "grpo") and only.startswith(name)):
            continue
        print(f"{checkout}: {name}", flush=True)
        with (out / f"{name}.log").open("w") as log:
            for command in commands:
                filled = [sys.executable, *[part.replace("{out}", str(out)) for part in command]]
                done = subprocess.run(filled, cwd=checkout, env=environment, stdout=log, stderr=log, check=False)
                if done.returncode:
                    sys.exit(f"{name} failed in {checkout}: see {out / name}.log")
    mark.write_text(stamp)


def content_of(checkout: Path) -> str:
    """A digest of the source files that the jobs run."""
    digest = hashlib.sha256()
    for folder in ("rlhf", "gym_baselines", "recipes"):
        for file in sorted((checkout / folder).rglob("*.[py][ya]*")):
            digest.update(str(file.relative_to(checkout)).encode() + file.read_bytes())
    return digest.hexdigest()


def results(out: Path) -> dict[str, Path]:
    """Name relative to `out` -> path, for each file that is compared."""
    files = {str(file.relative_to(out)): file for pattern in COMPARED for file in out.rglob(pattern)}
    return {name: file for name, file in sorted(files.items()) if not set(LATE) & set(Path(name).parts)}


def differences(before: Path, after: Path) -> Iterator[str]:
    """A sentence for each file that is not the same on both sides."""
    first, second = results(before), results(after)
    for name in sorted(first.keys() ^ second.keys()):
        yield f"{name}: only {'before' if name in first else 'after'}"
    for name in sorted(first.keys() & second.keys()):
        old, new = first[name].read_bytes(), second[name].read_bytes()
        if old != new:
            yield f"{name}: " + (of_lines(old, new) if name.endswith(".jsonl") else "bytes differ")


def of_lines(old: bytes, new: bytes) -> str:
    """Describe how two files of JSON lines differ."""
    before, after = ([json.loads(line) for line in text.splitlines()] for text in (old, new))
    if len(before) != len(after):
        return f"{len(before)} lines before, {len(after)} after"
    names = [sorted({name for line in lines for name in line}) for lines in (before, after)]
    common = set(names[0]) & set(names[1])
    changed = sorted({n for a, b in zip(before, after, strict=True) for n in common if a.get(n) != b.get(n)})
    parts = [f"{', '.join(changed)} differ" if changed else "all common keys agree"]
    parts += [f"lost {sorted(set(names[0]) - common)}"] if set(names[0]) - common else []
    parts += [f"gained {sorted(set(names[1]) - common)}"] if set(names[1]) - common else []
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default="", help="run jobs whose names begin with this (and the models they need)")
    parser.add_argument("--output", type=Path, default=Path("runs/compared"))
    options = parser.parse_args()
    sides = []
    for side, checkout in (("before", options.before), ("after", options.after)):
        sides.append((options.output / side).resolve())
        run(checkout.resolve(), sides[-1], options.only)
    found = list(differences(*sides))
    print("\n".join(found) if found else f"{len(results(sides[0]))} files, all byte-identical")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
