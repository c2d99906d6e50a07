"""Trains on this machine's GPU, checks what a GPU may get wrong, and measures speed and memory. A few minutes.

make gpu PYTHON=...          or          python benchmarks/gpu.py [STAGE ...]

Any Python with torch, transformers and accelerate will do: nothing is installed, downloaded or kept, and without Gymnasium
the control stage is skipped. Without a GPU the same stages run on the CPU at small size, which shows nothing of CUDA.
Each stage is a process of its own, since Accelerate fixes the precision of a process.
"""

import gc
import importlib.util
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that a resumed run can be compared bit for bit
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
except ImportError as error:
    sys.exit(
        f"{sys.executable}: {error}. Name a Python that has torch, transformers and accelerate: make gpu PYTHON=..."
    )

sys.path.insert(0, str(Path(__file__).parents[1]))

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SKIPPED = 77
"""Exit status of a stage that cannot run here."""


def check(holds: bool, promise: str) -> None:
    if os.environ.get("RANK", "0") == "0" or not holds:
        print(f"    {'ok    ' if holds else 'BROKEN'} {promise}", flush=True)
    if not holds:
        sys.exit(1)


# --- does it train? ---


def in_float32(folder: Path) -> None:
    ppo = trained("PPO", "float32", folder)
    devices(ppo)
    same_as_cpu(ppo)
    trained("GRPO", "float32", folder)
    resumed(folder)


def in_bfloat16(folder: Path) -> None:
    autocast(trained("PPO", "bfloat16", folder))
    trained("GRPO", "bfloat16", folder)


def with_a_process_group(folder: Path) -> None:
    """One process under NCCL (gloo on a CPU): DistributedDataParallel and the collectives that several would use."""
    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"})
    trainer = trained("PPO", "bfloat16", folder)
    wrapped = type(trainer.learner.model).__name__
    check(wrapped == "DistributedDataParallel", f"the policy is wrapped ({wrapped}, {dist.get_backend()})")
    check(dist.get_backend() == ("nccl" if GPU else "gloo"), "the backend is the device's")
    ones = torch.ones(3, device=DEVICE)
    dist.all_reduce(ones)
    pieces = [torch.empty_like(ones)]
    dist.all_gather(pieces, ones)
    check(pieces[0].tolist() == [1.0, 1.0, 1.0], "sums and gathers arrive")


def in_shards(folder: Path) -> None:
    """FSDP2 on every GPU of this machine (two processes on a CPU): weights in shards, bfloat16 arithmetic."""
    from torch.distributed.tensor import DTensor

    from rlhf.layout import FullySharded

    FullySharded.whole_up_to = 0  # checkpoints in shards too
    trainer = trained("PPO", "bfloat16", folder)
    layout = trainer.distributed.layout
    check(layout.name == "FSDP2", f"{trainer.distributed.world_size} process(es) share the weights ({layout.name})")
    parameters = [*trainer.policy.parameters(), *trainer.reference.module.parameters()]
    check(all(isinstance(p, DTensor) for p in parameters), f"{len(parameters)} tensors are in shards")
    check({p.dtype for p in trainer.policy.parameters()} == {torch.float32}, "what is trained is float32")
    moments = [state["exp_avg"] for state in trainer.learner.own_optimizer.state.values()]
    check(all(isinstance(m, DTensor) and m.dtype == torch.float32 for m in moments), "so are the moments, in shards")
    files = sorted(path.name for path in (folder / "PPO" / "checkpoints").rglob("policy.*.safetensors"))
    check(
        len(files) == trainer.distributed.world_size, f"each process wrote its share of the checkpoint ({len(files)})"
    )


def with_adapters(folder: Path) -> None:
    """LoRA on a bfloat16 base, a value adapter on the same base, and layers computed again in the backward pass."""
    if importlib.util.find_spec("peft") is None:
        print("    peft is not installed here")
        sys.exit(SKIPPED)
    from peft import LoraConfig

    more = {"critic": "adapter", "gradient_checkpointing": True, "learning_rate": 1e-2}
    trainer = trained("PPO", "bfloat16", folder, peft_config=LoraConfig(r=16, target_modules="all-linear"), **more)
    kinds = {(p.requires_grad, p.dtype) for p in trainer.policy.parameters()}
    check(kinds == {(True, torch.float32), (False, torch.bfloat16)}, "the base is bfloat16, the adapters float32")
    first = read_first(folder / "PPO")
    check(first["reward_kl"] == 0.0, "the first step's KL to the base is exactly 0")
    trained("GRPO", "bfloat16", folder, peft_config=LoraConfig(r=16, target_modules="all-linear"), learning_rate=1e-2)


def read_first(run: Path) -> dict[str, Any]:
    from rlhf.runs.jsonlines import read_metrics

    return read_metrics(run)[0]


def trained(kind: str, precision: str, folder: Path, **settings: Any) -> Any:
    """A small model after 12 steps, in each of which the trainer compared sampler and policy."""
    from gpu_task import SMALL, make_trainer

    from rlhf.runs.jsonlines import read_metrics

    output = folder / kind
    settings = {"total_steps": 12, "learning_rate": 3e-3, "precision": precision, **settings}
    trainer = make_trainer(kind, output, SMALL, prompts=64, tokens=16, **settings)
    with quiet():
        trainer.train()
    trainer.distributed.barrier()
    lines = read_metrics(output)
    gap, mean, score = (trainer.metric_names.get(name, name) for name in ("sampler_gap", "sampler_gap_mean", "score"))
    if trainer.distributed.is_main:
        print(
            f"    {kind}: score {lines[0][score]:.2f} -> {lines[-1][score]:.2f}; log-probs of sampler and policy differ by "
            f"{max(line[gap] for line in lines):.1e} nats at most, {max(line[mean] for line in lines):.1e} on average"
        )
    check(lines[-1][score] > lines[0][score] + 0.1, f"{kind} learns")
    return trainer


def devices(trainer: Any) -> None:
    """Policy, reference, optimizer state and trajectories are where they should be."""
    tensors = [*trainer.policy.parameters(), *trainer.reference.module.parameters()]
    for state in trainer.learner.own_optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value) and value.dim() > 0]
    with quiet():
        given = trainer.source.collect(trainer.step - 1).trajectories
    tensors += [given.mask, given.rewards, given.sampling_logprobs, given.old_logprobs, *given.inputs.values()]
    found = {tensor.device.type for tensor in tensors}
    check(found == {DEVICE}, f"{len(tensors)} tensors are on {', '.join(sorted(found))}")


def same_as_cpu(trainer: Any) -> None:
    """Log-probs, values and entropies of the trained policy, computed on both devices."""
    if not GPU:
        return
    from copy import deepcopy

    ids = torch.randint(4, 14, (16, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "prompt_lengths": torch.full((16,), 4)}
    outputs = []
    for device in ("cpu", DEVICE):
        policy = deepcopy(trainer.policy).to(device)
        given = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.no_grad():
            found = policy(given, ids[:, 4:].to(device), with_values=True, with_entropy=True)
        outputs.append(torch.stack([found.logprobs, found.values, found.entropy]).cpu())
    gap = (outputs[0] - outputs[1]).abs().max().item()
    check(gap < 1e-3, f"GPU and CPU differ by at most {gap:.1e} in log-probs, values and entropies")


def autocast(trainer: Any) -> None:
    """bfloat16 in the arithmetic alone: weights, log-probs and optimizer state stay in float32."""
    ids = torch.randint(4, 14, (2, 8), device=DEVICE)
    with torch.no_grad(), trainer.distributed.autocast():
        logits = trainer.policy.lm(input_ids=ids).logits
        outputs = trainer.policy({"input_ids": ids, "prompt_lengths": torch.tensor([4, 4], device=DEVICE)}, ids[:, 4:])
    check(logits.dtype == torch.bfloat16, f"the forward computes in {logits.dtype}")
    moments = [s["exp_avg"].dtype for s in trainer.learner.own_optimizer.state.values()]
    kept = {*moments, outputs.logprobs.dtype, *(p.dtype for p in trainer.policy.parameters())}
    check(kept == {torch.float32}, "weights, moments and log-probs are float32")


def resumed(folder: Path) -> None:
    """Six steps, and three, a checkpoint and three more: the same weights."""
    from gpu_task import SMALL, make_trainer

    from rlhf import Callback

    class StopAfterThree(Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: Any) -> None:
            trainer.should_stop = step == 2

    def run(name: str, resume: bool = False) -> dict[str, torch.Tensor]:
        settings = {"total_steps": 6, "learning_rate": 1e-3}
        trainer = make_trainer("PPO", folder / name, SMALL, prompts=32, tokens=12, **settings)
        trainer.run.callbacks = [StopAfterThree()] if name == "parts" and not resume else []
        with quiet():
            trainer.train(resume=resume)
        return {key: value.detach().cpu().clone() for key, value in trainer.policy.named_parameters()}

    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = run("whole")
    run("parts")
    parts = run("parts", resume=True)
    torch.use_deterministic_algorithms(False)
    furthest = max((whole[key] - parts[key]).abs().max().item() for key in whole)
    found = "the same bits" if furthest == 0 else f"weights {furthest:.1e} apart"
    check(furthest < 1e-4, f"a resumed run ends with {found}")


def control(folder: Path) -> None:
    if importlib.util.find_spec("gymnasium") is None:
        print("    SKIPPED: Gymnasium is not installed, so that nothing of gym_baselines was seen")
        sys.exit(SKIPPED)
    from gym_baselines import PPO
    from gym_baselines.evaluate import evaluate

    agent = PPO("CartPole-v1", seed=0, device="auto")
    started = time.perf_counter()
    agent.learn(30_000, progress_bar=False)
    seconds = time.perf_counter() - started
    where = agent.policy.device.type
    check(where == DEVICE, f"CartPole is learnt on {where}: 30,000 steps in {seconds:.0f} s")
    mean = float(evaluate(agent, episodes=10).mean)
    check(mean > 150, f"the mean return of 10 episodes is {mean:.0f} (random actions: 22)")


# --- how fast, and how much memory? ---


def speed(precision: str) -> Callable[[Path], None]:
    def stage(folder: Path) -> None:
        from gpu_task import LARGE, SMALL, make_trainer

        size, prompts, tokens = (LARGE, 256, 256) if GPU else (SMALL, 32, 32)
        for kind in ("PPO", "GRPO"):
            trainer = make_trainer(
                kind, folder / kind, size, prompts=prompts, tokens=tokens, total_steps=3, precision=precision
            )
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(trainer)
            with quiet():
                trainer.train()
            tokens_seen = seconds.pop("tokens")
            parameters = sum(p.numel() for p in trainer.policy.parameters())
            print(
                f"    {kind}, {parameters / 1e6:.1f} million parameters, {prompts} completions of up to {tokens} tokens: "
                f"{tokens_seen / sum(seconds.values()):,.0f} tokens/s (rollout {seconds['rollout']:.1f} s, update "
                f"{seconds['update']:.1f} s for {tokens_seen:,} tokens), peak memory {peak_memory()}"
            )
            del trainer
            gc.collect()

    return stage


def timed(trainer: Any) -> dict[str, float]:
    """Seconds of rollout and update, and tokens sampled: filled while the trainer runs. The first step is not counted."""
    spent = {"rollout": 0.0, "update": 0.0, "tokens": 0}
    collect, learn = trainer.source.collect, trainer.learner.learn

    def clocked(part: str, call: Callable[..., Any], step: int) -> Any:
        synchronize()
        started = time.perf_counter()
        answer = call()
        synchronize()
        if step > 0:
            spent[part] += time.perf_counter() - started
        return answer

    def timed_collect(step: int) -> Any:
        collected = clocked("rollout", lambda: collect(step), step)
        if step > 0:
            spent["tokens"] += int(collected.trajectories.mask.sum())
        return collected

    trainer.source.collect = timed_collect
    trainer.learner.learn = lambda given, **options: clocked("update", lambda: learn(given, **options), options["step"])
    return spent


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def peak_memory() -> str:
    if GPU:
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process so far"


# --- stages ---

STAGES: dict[str, Callable[[Path], None]] = {
    "float32": in_float32,
    "bfloat16": in_bfloat16,
    "process-group": with_a_process_group,
    "shards": in_shards,
    "adapters": with_adapters,
    "control": control,
    "speed-float32": speed("float32"),
    "speed-bfloat16": speed("bfloat16"),
}


def command(name: str, folder: str) -> list[str]:
    """The stage as a command; "shards" is started once for each GPU."""
    start = [sys.executable]
    if name == "shards":
        os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"})
        processes = torch.cuda.device_count() if GPU else 2
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
        start += ["--rdzv_endpoint", "localhost:0"]
    else:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    return [*start, __file__, "--stage", name, folder]


def quiet() -> Any:
    """Hides what trainers print; errors are not hidden."""
    stack = ExitStack()
    stack.enter_context(redirect_stdout(StringIO()))
    stack.enter_context(redirect_stderr(StringIO()))
    return stack


def device_line() -> str:
    import accelerate
    import transformers

    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    if not GPU:
        return versions
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {versions}"


def warn() -> None:
    if not GPU:
        bar = "!" * 100
        print(
            f"{bar}\nNO GPU HERE: everything ran on the CPU, at small size. NOTHING OF CUDA WAS SEEN.\n{bar}",
            flush=True,
        )


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in STAGES]:
        sys.exit(f"{', '.join(unknown)}: no such stage. Choose from {', '.join(STAGES)}.")
    print(f"Python {sys.version.split()[0]}, {device_line()}")
    warn()
    results = {}
    for name in names or STAGES:
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            status = subprocess.run(command(name, folder)).returncode
        results[name] = {0: "passed", SKIPPED: "SKIPPED"}.get(status, "FAILED")
        print(f"    {results[name]} after {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n{', '.join(f'{name} {result}' for name, result in results.items())}")
    warn()
    return 1 if "FAILED" in results.values() else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        STAGES[sys.argv[2]](Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
