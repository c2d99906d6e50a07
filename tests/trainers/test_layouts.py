"""Layouts equal one process: DDP and FSDP2 on two gloo processes sample the same tokens and learn the same weights.

The processes are real ones (torchrun); this file is also what they run. One launch runs every case under both layouts.
Cases cover pairwise: tied and untied weights, all weights and adapters (fresh, and one trained before), each critic,
dynamic sampling, a reward model and a reference that are sharded too, unequal lengths, prompts and microbatches, and
tensors smaller than the number of processes (the bias of a value head has one number).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rlhf.layout import FullySharded
from rlhf.models.adapters import adapter_of
from rlhf.rewards.model import RewardModel
from rlhf.runs.checkpoint import read_checkpoint
from rlhf.runs.jsonlines import read_metrics
from rlhf.training.optimizer_state import optimizer_tensors
from rlhf.training.weights import trained_tensors
from tests import tiny
from tests.tiny import AtStep
from tests.trainers.grpo_runs import lines_of
from tests.trainers.grpo_runs import make_trainer as grpo_trainer

STEPS = 3
WEIGHTS = 1e-9
"""Largest difference of a weight after 3 steps in float64, see DESIGN: the order of sums alone differs."""
PROMPTS = ["ab", "c", "defgh", "gha", "bbbbbbb", "hg", "fed"]
LAYOUTS = ("ddp", "fsdp2")
FLOAT32 = "adapter in float32"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": "all-linear", **settings})


def trained_adapter(family: str) -> Any:
    """A PeftModel whose adapter has an effect."""
    model = get_peft_model(tiny.causal_lm(family, dtype=torch.float64), lora())
    tiny.randomise(model)  # the base too: it is what it is
    return model


def ppo(out: Path, family: str, **settings: Any) -> Any:
    return tiny.trainer(
        out,
        lm=settings.pop("lm", None) or tiny.causal_lm(family, dtype=torch.float64),
        dataset=tiny.rows(PROMPTS),
        eval_dataset=tiny.rows(["abc", "hh", "dead", "c", "bf"]),
        total_steps=STEPS,
        update={"minibatch_size": 3, **settings.pop("update", {})},
        **{"prompts_per_step": 6, "checkpoint_every": 1, "keep_checkpoints": STEPS, **settings},
        log_completions=2,  # each process has as many
    )


def grpo(out: Path, family: str, **settings: Any) -> Any:
    return grpo_trainer(
        out,
        lm=tiny.causal_lm(family, dtype=torch.float64),
        keep_checkpoints=STEPS,
        total_steps=STEPS,
        prompts_per_step=4,
        update={"minibatch_size": 8, **settings.pop("update", {})},
        **settings,
    )


def in_float32(out: Path) -> Any:
    """Compared by its losses and first gradients alone: Adam makes much of little differences."""
    return ppo(out, "llama", lm=tiny.causal_lm("llama"), peft_config=lora(), ppo={"kl_coef": 0.2})


def judge() -> RewardModel:
    model = tiny.reward_model("llama", dtype=torch.float64)
    return RewardModel(model, reward_tokenizer=tiny.tokenizer())


CASES: dict[str, Callable[[Path], Any]] = {
    "tied": lambda out: ppo(
        out,
        "gpt2",
        prompts_per_step=9,  # 4 and 5 prompts; minibatches of 3: 2 rows and 1
        update={"microbatch_tokens": 24},
        ppo={"kl_target": 0.5, "kl_horizon": 50, "entropy_coef": 0.02, "penalty_coef": 0.5, "penalty_target": 0.01},
        eval_every=2,
    ),
    "untied, judged by a model, critic made from it": lambda out: ppo(
        out,
        "llama",
        rewards=judge(),
        critic=tiny.reward_model("llama", dtype=torch.float64),
        update={"minibatch_size": 1},  # the second process has no row
        critic_learning_rate=3e-2,
        critic_warmup_steps=1,
        gradient_checkpointing=True,
    ),
    "adapter and value adapter": lambda out: ppo(
        out, "llama", peft_config=lora(), critic="adapter", update={"microbatch_tokens": 1}, gradient_checkpointing=True
    ),
    "from a trained adapter": lambda out: ppo(out, "gpt2", lm=trained_adapter("gpt2"), ppo={"kl_coef": 0.2}),
    "dynamic sampling": lambda out: grpo(out, "gpt2", update={"microbatch_tokens": 20}),
    FLOAT32: in_float32,
    "adapter without a critic": lambda out: grpo(out, "llama", peft_config=lora(modules_to_save=["lm_head"])),
}


def run_case(case: str, out: Path) -> Any:
    trainer = CASES[case](out)
    chunk = trainer.policy
    chunk.chunk_tokens = 5  # several chunks of logits
    trainer.train()
    return trainer


def interrupted(out: Path) -> Any:
    """The run that other numbers of processes take up: two of its three steps."""
    return ppo(out, "gpt2", lm=trained_adapter("gpt2"), critic="adapter", callbacks=[AtStep(1, stop)])


def stop(trainer: Any) -> None:
    trainer.should_stop = True


def restored(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """The trained weights and moments of a trainer that goes on from a copy of `source`; then it does."""
    trainer = ppo(out, "gpt2", lm=trained_adapter("gpt2"), critic="adapter")
    group = trainer.distributed
    if group.is_main:
        shutil.copytree(source, out)
    group.barrier()
    trainer._begin(True, False)
    tensors = group.layout.whole(trained_tensors(trainer.policy))
    moments, _ = optimizer_tensors(trainer.learner.own_optimizer, trainer.policy.named_parameters())
    tensors |= group.layout.whole(moments)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    trainer.run.close()
    group.barrier()
    trainer.train(resume=True)
    return tensors


def go_on(sources: Path, processes: int) -> None:
    """Restore, and finish, the interrupted run of every number of processes that there is."""
    for source in sorted(sources.glob("saved-by-?")):
        name = f"{source.name}-resumed-by-{processes}"
        tensors = restored(source, sources / name)
        if tensors:  # the main process has them
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, sources / f"{name}.safetensors")


class Collectives:
    """Counts this process's collectives, by name and in order."""

    names = ("all_reduce", "all_gather", "barrier", "broadcast", "all_gather_object")
    sharded = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")

    def __init__(self) -> None:
        self.seen: list[str] = []
        for name in (*self.names, *self.sharded):
            if hasattr(dist, name):  # newer versions of torch have other names
                setattr(dist, name, self._noting(name, getattr(dist, name)))

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            self.seen.append(name)
            return function(*arguments, **keywords)

        return called


def elastic(out: Path) -> None:
    """What each process does for the tests of checkpoints."""
    torch.set_num_threads(1)
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    FullySharded.whole_up_to = 0  # every tensor in shards
    processes = int(os.environ["WORLD_SIZE"])
    if not (out / f"saved-by-{processes}").exists():
        interrupted(out / f"saved-by-{processes}").train()
    go_on(out, processes)


def main(out: Path) -> None:
    """What each process does for the tests of layouts."""
    torch.set_num_threads(1)
    counted = Collectives()
    for layout in LAYOUTS:
        os.environ.update({"ACCELERATE_USE_FSDP": str(layout == "fsdp2").lower(), "FSDP_VERSION": "2"})
        for case in CASES:
            counted.seen.clear()
            trainer = run_case(case, out / layout / case)
            assert trainer.distributed.layout.name == {"ddp": "DDP", "fsdp2": "FSDP2"}[layout]
            torch.save(list(counted.seen), out / f"{layout}-{case}.{os.environ['RANK']}.pt")


def launch(out: Path, *arguments: str, processes: int = 2, timeout: float = 400) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.trainers.test_layouts", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    launch(out)
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("four")
    launch(out, processes=4)
    return out


@pytest.fixture(scope="module", params=CASES)
def one(request, tmp_path_factory) -> tuple[str, Path]:
    """(name, what one process wrote)."""
    out = tmp_path_factory.mktemp("one")
    run_case(request.param, out)
    return request.param, out


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def case(request, one) -> tuple[str, Path, Path]:
    """(name, what one process wrote, what several wrote)."""
    return (*one, request.getfixturevalue(request.param))


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}"
    return {**load_file(checkpoint / "policy.safetensors"), **load_file(checkpoint / "optimizer.safetensors")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_samples_the_tokens_of_one_process(case, layout):
    name, one, two = case
    runs = [lines_of(run) for run in (one, two / layout / name)]
    expected, got = ({(line["step"], line["prompt"], line["completion"]) for line in lines} for lines in runs)
    assert {step for step, *_ in got} == set(
        range(STEPS)
    ) and got <= expected  # the main process of four may have fewer to log


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_learns_the_weights_and_moments_of_one_process(case, layout):
    name, one, two = case
    if name == FLOAT32:
        pytest.skip("see the test of its losses and gradients")
    expected, got = weights(one), weights(two / layout / name)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=WEIGHTS, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_reports_the_metrics_of_one_process(case, layout):
    name, one, two = case
    tolerance, lines = (1e-5, 1) if name == FLOAT32 else (1e-7, STEPS)
    pairs = list(zip(read_metrics(one), read_metrics(two / layout / name), strict=True))
    for expected, got in pairs[:lines]:  # losses and gradient norms among them
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_exported_policy_is_that_of_one_process(case, layout):
    name, one, two = case
    if name == FLOAT32:
        pytest.skip("its weights may differ")
    folders = [one / "policy", two / layout / name / "policy"]
    files = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in folders]
    assert files[0] == files[1]
    for file in files[0]:
        if file.suffix == ".safetensors":
            expected, got = (load_file(folder / file) for folder in folders)
            assert got.keys() == expected.keys()
            for key in expected:
                torch.testing.assert_close(got[key], expected[key], rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_processes_make_the_same_collectives_in_the_same_order(case, layout):
    name, _, out = case
    ranks = [torch.load(file) for file in out.glob(f"{layout}-{name}.?.pt")]
    assert len(ranks) > 1 and all(seen == ranks[0] for seen in ranks) and len(ranks[0]) > 20


def test_a_checkpoint_holds_the_adapters_alone(one):
    name, run = one
    if "adapter" in name:
        kept = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "policy.safetensors")
        assert all(key.startswith("critic.") or adapter_of(key) for key in kept)


# --- checkpoints in shards -----------------------------------------------------------------------------------------------


def saved(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(run / "checkpoints" / "step-000002")
    return {**checkpoint.tensors("policy"), **checkpoint.tensors("optimizer")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one and two processes, interrupted and taken up by one and two."""
    out = tmp_path_factory.mktemp("elastic")
    interrupted(out / "saved-by-1").train()
    launch(out, "elastic")
    go_on(out, 1)
    return out


@pytest.fixture(scope="module")
def more_runs(runs) -> Path:
    """Those of three processes, too."""
    launch(runs, "elastic", processes=3)
    for left in (*runs.glob("*-resumed-by-[12]"), *runs.glob("*-resumed-by-[12].safetensors")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    launch(runs, "elastic")
    go_on(runs, 1)
    return runs


def check_elastic(runs: Path, before: int, after: int) -> None:
    name = f"saved-by-{before}-resumed-by-{after}"
    expected, got = saved(runs / f"saved-by-{before}"), load_file(runs / f"{name}.safetensors")
    assert got.keys() == expected.keys() and any("exp_avg" in key for key in got)
    assert all(torch.equal(got[key], expected[key]) for key in expected), "to the last bit, moments included"
    for key, tensor in weights(runs / "saved-by-1-resumed-by-1").items():
        torch.testing.assert_close(read_weights(runs / name)[key], tensor, rtol=0, atol=WEIGHTS)


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(run / "checkpoints" / f"step-{STEPS:06d}")
    return {**checkpoint.tensors("policy"), **checkpoint.tensors("optimizer")}


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_a_checkpoint_of_any_number_of_processes_is_taken_up_by_any(runs, before, after):
    check_elastic(runs, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_checkpoint_of_one_to_three_processes_is_taken_up_by_any(more_runs, before, after):
    check_elastic(more_runs, before, after)


def test_each_process_writes_a_file_of_its_own_rows(runs):
    files = {path.name for path in (runs / "saved-by-2" / "checkpoints" / "step-000002").iterdir()}
    shards = {f"{group}.0000{n}-of-00002.safetensors" for group in ("policy", "optimizer") for n in (1, 2)}
    assert files == shards | {"MANIFEST.json", "state.json"}
    for group in ("policy", "optimizer"):
        tensors = [load_file(runs / "saved-by-2" / "checkpoints" / "step-000002" / n) for n in shards if group in n]
        assert any(len(tensor) == 0 for part in tensors for tensor in part.values() if tensor.dim()), "an empty share"


if __name__ == "__main__":
    (elastic if "elastic" in sys.argv[2:] else main)(Path(sys.argv[1]))
