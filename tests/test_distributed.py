"""How a run was launched: what is not here is refused by name, and what did not happen is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import InputError
from rlhf.distributed import Distributed
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("variable", "kind"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_launch_that_asks_for_sharding_is_refused_before_anything_is_loaded(variable, kind, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=rf"asks for {kind}.*every process holds the whole one.*ddp\.yaml"):
        tiny.trainer(tmp_path / "run", lm="/no/such/model", tokenizer=tiny.tokenizer())
    assert not (tmp_path / "run").exists()


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


def launch(out: Path, *options: str) -> str:
    script = out / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), str(out / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_launch_that_started_fewer_processes_than_were_asked_for_says_so(tmp_path):
    """`--cpu --num_processes 2` starts one. With one asked for, nothing is said."""
    two = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert "1 process(es)" in two and "asked for several processes and has started one" in two and "cpu2.yaml" in two
    (tmp_path / "other").mkdir()
    assert "asked for several" not in launch(tmp_path / "other", "--cpu", "--num_processes", "1")


def test_one_process_has_nothing_to_say_of_its_launch(distributed):
    assert distributed.notes == [] and Distributed().world_size == 1


def test_a_policy_of_which_nothing_is_trained_is_refused(tmp_path):
    lm = tiny.causal_lm().requires_grad_(False)
    with pytest.raises(InputError, match=r"policy: requires_grad is False.*requires_grad_\(True\)"):
        tiny.trainer(tmp_path, lm=lm)
    lm.get_output_embeddings().weight.requires_grad_(True)
    tiny.trainer(tmp_path, lm=lm, total_steps=1).train()
