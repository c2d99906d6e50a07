"""Environment steps per CPU second on CartPole-v1's preset: Stable-Baselines3, this package, and this package compiled.

    python benchmarks/control_speed.py --rounds 5

The three run one after the other, each in its own process with one thread on one core; every round has another order
and seed. All use the settings of rl-zoo's tuned PPO (8 x 32 steps, minibatches of 256, 20 epochs) and no render mode.
Times are CPU times of the process, so other load on the machine matters little. They exclude imports and evaluation;
compile time is reported separately: the first round compiles from scratch, later ones use the compiler's cache on disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"sb3": "Stable-Baselines3", "eager": "gym_baselines", "compiled": "gym_baselines, compile"}


class Clock:
    """CPU and wall seconds of training, update by update."""

    def __init__(self) -> None:
        self.cpu, self.wall = [time.process_time()], [time.perf_counter()]

    def __call__(self, *_: Any) -> None:
        """After each update."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def report(self, *, compiled: bool = False) -> dict[str, float]:
        """seconds: CPU time of training. If `compiled`, without the compile time, which is reported separately: the
        time by which the first update exceeds the median of the others, plus the CPU time of child processes.
        """
        seconds = self.cpu[-1] - self.cpu[0]
        if not compiled:
            return {"seconds": seconds}
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = _first_beyond_others(self.cpu)
        return {
            "seconds": seconds - own,
            "compile_wall": _first_beyond_others(self.wall),
            "compile_cpu": own + children.ru_utime + children.ru_stime,
        }


def _first_beyond_others(marks: list[float]) -> float:
    first, *later = [after - before for before, after in pairwise(marks)]
    return max(0.0, first - median(later))


def run_sb3(seed: int, steps: int) -> dict[str, float]:
    import gymnasium as gym
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    class AfterRollouts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            clock()

    def linear(start: float) -> Callable[[float], float]:
        return lambda remaining: start * remaining

    clock = Clock()
    envs = make_vec_env("CartPole-v1", 8, seed=seed, env_kwargs={"render_mode": None})
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=linear(1e-3),
        clip_range=linear(0.2),
        ent_coef=0.0,
        seed=seed,
        device="cpu",
    )
    model.learn(steps, callback=AfterRollouts())
    clock()
    mean, _ = evaluate_policy(model, Monitor(gym.make("CartPole-v1")), n_eval_episodes=100, deterministic=True)
    return {**clock.report(), "steps": model.num_timesteps, "return": float(mean)}  # type: ignore[arg-type]


def run_ours(seed: int, steps: int, *, compile: bool) -> dict[str, float]:
    from gym_baselines import evaluate, preset, train

    # unlike rl-zoo, the preset has an entropy bonus
    config = preset("CartPole-v1", seed=seed, total_steps=steps, progress_bar=False, compile=compile, entropy_coef=0.0)
    clock = Clock()
    agent = train(config, callbacks=[clock])
    mean, _ = evaluate(agent, episodes=100)
    return {**clock.report(compiled=compile), "steps": agent.environment_steps, "return": mean}


def measure(kind: str, seed: int, steps: int, cache: str) -> dict[str, float]:
    """One run, in its own process."""
    command = [sys.executable, __file__, "--run", kind, "--seed", str(seed), "--steps", str(steps)]
    environment = os.environ | {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, seed: int, steps: int) -> None:
    """The process that `measure` starts: on one core with one thread, it prints one line of results."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int, int], dict[str, float]]] = {
        "sb3": run_sb3,
        "eager": partial(run_ours, compile=False),
        "compiled": partial(run_ours, compile=True),
    }
    runs["eager" if kind == "compiled" else kind](seed, 256)  # warms up: libraries load more at their first step
    print(json.dumps(runs[kind](seed, steps)))


def spread(numbers: list[float], digits: int = 0) -> str:
    return f"{median(numbers):.{digits}f} ({min(numbers):.{digits}f}..{max(numbers):.{digits}f})"


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Medians and ranges over rounds; ratios are taken within a round, where machine load was about equal."""
    rates = {kind: [round[kind]["steps"] / round[kind]["seconds"] for round in rounds] for kind in KINDS}
    lines = [f"{'':<25}{'steps per CPU second':<26}{'x Stable-Baselines3':<24}{'greedy return, 100 episodes'}"]
    for kind, label in KINDS.items():
        ratios = [own / peer for own, peer in zip(rates[kind], rates["sb3"], strict=True)]
        returns = [round[kind]["return"] for round in rounds]
        lines.append(f"{label:<25}{spread(rates[kind]):<26}{spread(ratios, 2):<24}{spread(returns, 1)}")
    for name, chosen in (("from scratch", rounds[:1]), ("with its cache on disk", rounds[1:])):
        if chosen:
            cpu = spread([round["compiled"]["compile_cpu"] for round in chosen], 1)
            wall = spread([round["compiled"]["compile_wall"] for round in chosen], 1)
            lines.append(f"compiling {name}: {cpu} CPU seconds, {wall} wall-clock seconds")
    return "\n".join(lines)


def main(num_rounds: int, steps: int) -> None:
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(num_rounds):
            kinds = list(KINDS)
            order = kinds[number % 3 :] + kinds[: number % 3]
            rounds.append({kind: measure(kind, number, steps, cache) for kind in order})
            rates = ", ".join(f"{kind} {r['steps'] / r['seconds']:.0f}" for kind, r in rounds[-1].items())
            print(f"round {number}: {rates} steps per CPU second", file=sys.stderr)
    print(f"CartPole-v1, {steps} steps, {num_rounds} seeds: median (min..max)\n\n{table(rounds)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds, each with its own seed")
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps of each run")
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        child(given.run, given.seed, given.steps)
    else:
        main(given.rounds, given.steps)
