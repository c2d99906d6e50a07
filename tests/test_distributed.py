"""How a run was launched: what is not here is refused by name, and what did not happen is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import InputError, TrainingError
from rlhf.distributed import Distributed
from rlhf.layout import FullySharded
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "fsdp2.yaml", "ddp.yaml"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron", "fsdp2.yaml"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["fsdp_version: 1", "only 2", "fsdp2.yaml"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["fsdp_version: 1", "only 2"]),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            ["fsdp_offload_params: true", "only false"],
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["group of processes", "accelerate launch"]),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "localhost"},
            ["several processes and has started 1", "cpu2"],
        ),
    ],
)
def test_a_launch_that_would_get_another_strategy_than_it_asks_for_is_refused(
    environment, parts, tmp_path, monkeypatch
):
    """Before anything is loaded, and with the remedy."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError) as error:
        tiny.trainer(tmp_path / "run", lm="/no/such/model", tokenizer=tiny.tokenizer())
    assert all(part in str(error.value) for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_model_that_would_be_one_shard_is_refused_and_one_that_is_left_whole_ends_the_run():
    """What Accelerate does in silence: a model without marked layers as one unit, or no shards at all."""
    layout = FullySharded.__new__(FullySharded)  # a group of processes is not needed for this
    with pytest.raises(InputError, match=r"FSDP2: Linear has no layers.*gathered at once.*ddp\.yaml"):
        layout._shard(torch.nn.Linear(2, 2), None)
    lm = tiny.causal_lm()
    with pytest.raises(
        TrainingError, match=r"FSDP2 was asked for, but LlamaForCausalLM has 0 unit\(s\).*not in shards"
    ):
        layout._prove(lm)


@pytest.mark.parametrize(
    ("tracker", "parts"), [("wandb", ["'wandb'", "pip install wandb"]), ("wandbb", ["wandbb", "tensorboard"])]
)
def test_a_tracker_that_is_not_there_is_refused_and_not_left_out_in_silence(tracker, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.distributed.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError) as error:
        tiny.trainer(tmp_path, tracker=tracker)
    assert all(part in str(error.value) for part in parts)


PROGRAM = """
import sys
from tests import tiny
tiny.trainer(sys.argv[1], total_steps=1).train()
"""


def launch(out: Path, *options: str) -> subprocess.CompletedProcess:
    script = out / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), str(out / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done


def test_a_launch_that_started_fewer_processes_than_were_asked_for_is_stopped(tmp_path):
    """`--cpu --num_processes 2` starts one. With one asked for, all is well."""
    two = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert two.returncode != 0 and "several processes and has started 1" in two.stderr and "cpu2.yaml" in two.stderr
    (tmp_path / "other").mkdir()
    one = launch(tmp_path / "other", "--cpu", "--num_processes", "1")
    assert one.returncode == 0 and "1 process(es)" in one.stdout


def test_one_process_has_nothing_to_say_of_its_launch(distributed):
    assert distributed.world_size == Distributed().world_size == 1


def test_a_policy_of_which_nothing_is_trained_is_refused(tmp_path):
    lm = tiny.causal_lm().requires_grad_(False)
    with pytest.raises(InputError, match=r"policy: requires_grad is False.*requires_grad_\(True\)"):
        tiny.trainer(tmp_path, lm=lm)
    lm.get_output_embeddings().weight.requires_grad_(True)
    tiny.trainer(tmp_path, lm=lm, total_steps=1).train()
