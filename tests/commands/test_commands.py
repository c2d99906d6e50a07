"""The README's commands, as a user types them: minutes long, so they run under `make test-slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rounding import EPS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command, cwd=ROOT, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def scores(folder):
    return [json.loads(line)["score"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_users_model_prompts_and_reward_function_train_by_one_command_and_the_reward_rises(tmp_path):
    run("recipes/examples/docstrings.py", tmp_path)
    sft = ["--model", tmp_path / "model", "--dataset", tmp_path / "chats.jsonl", "--output_dir", tmp_path / "sft"]
    run("recipes/sft.py", *sft, "--num_epochs=1", "--learning_rate=3e-3", "--batch_size=64")
    run(
        *["-m", "accelerate.commands.launch", "recipes/ppo_rlhf.py", "--policy", tmp_path / "sft"],
        *["--dataset", tmp_path / "prompts.jsonl", "--reward", "recipes/examples/my_rewards.py:brief"],
        *["--output_dir", tmp_path / "ppo", "--learning_rate=3e-4", "--total_steps=15"],
        "--generation.max_new_tokens=32",
    )
    learnt = scores(tmp_path / "ppo")
    assert sum(learnt[-3:]) / 3 > learnt[0] + 0.2, learnt
    code = (
        "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    run("-c", code, tmp_path / "ppo" / "policy", cwd=tmp_path)


def test_a_built_wheel_installs_and_imports(tmp_path):
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("rlhf_toolkit-*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    code = "import rlhf.core.losses, gym_baselines.envs.environments, gym_baselines.compare; "
    code += "print(rlhf.__file__); from rlhf import PPOTrainer"
    where = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site") in where


def test_accelerate_launch_on_two_processes_gives_the_same_scores_as_one(tmp_path):
    settings = ["recipes/ppo_rlhf.py", "--total_steps=2", "--prompts_per_step=6", "--update.minibatch_size=3"]
    settings += ["--generation.max_new_tokens=12", "--learning_rate=1e-3"]
    inputs = ["--policy", tmp_path / "model", "--dataset", tmp_path / "prompts.jsonl"]
    inputs += ["--reward", "recipes/examples/my_rewards.py:brief"]
    run("recipes/examples/docstrings.py", tmp_path)
    run(*settings, *inputs, "--output_dir", tmp_path / "one", CUDA_VISIBLE_DEVICES="")
    two = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml"]
    report = run(*two, *settings, *inputs, "--output_dir", tmp_path / "two", CUDA_VISIBLE_DEVICES="")
    assert "2 process(es)" in report
    assert scores(tmp_path / "two") == pytest.approx(scores(tmp_path / "one"), abs=64 * EPS)
