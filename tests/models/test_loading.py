"""No code that a model brings along is run, and nobody is asked whether it may."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import InputError
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.rewards.model import RewardModel
from tests import tiny

ROOT = Path(__file__).parents[2]
CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
class MineConfig(LlamaConfig): model_type = "mine"
class MineForCausalLM(LlamaForCausalLM): config_class = MineConfig
class MineForSequenceClassification(LlamaForSequenceClassification): config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model whose classes are in a file beside it, which leaves a mark when it is run."""
    path = tmp_path / "mine"
    tiny.causal_lm().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    (path / "mine.py").write_text(CODE.format(mark=str(tmp_path / "was run")))
    config = json.loads((path / "config.json").read_text())
    classes = {"AutoConfig": "MineConfig", "AutoModelForCausalLM": "MineForCausalLM"}
    classes["AutoModelForSequenceClassification"] = "MineForSequenceClassification"
    config |= {"model_type": "mine", "auto_map": {auto: f"mine.{name}" for auto, name in classes.items()}}
    (path / "config.json").write_text(json.dumps(config))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("load", "setting"),
    [(load_causal_lm, "policy"), (load_tokenizer, "tokenizer"), (RewardModel.load, "reward_model")],
    ids=["policy", "tokenizer", "reward model"],
)
def test_a_model_with_code_of_its_own_is_refused_with_the_remedy_and_the_code_is_not_run(
    load, setting, folder, tmp_path
):
    with pytest.raises(InputError, match=rf"{setting}: .*mine.*code of its own.*trust_remote_code=True.*as {setting}"):
        load(str(folder))
    assert not (tmp_path / "was run").exists()


def test_nobody_is_asked_on_standard_input_and_a_yes_there_changes_nothing(folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    (tmp_path / "rewards.py").write_text("def good(completions, **_): return [1.0 for _ in completions]\n")
    command = [
        sys.executable,
        "recipes/ppo_rlhf.py",
        "--policy",
        str(folder),
        "--reward",
        f"{tmp_path}/rewards.py:good",
    ]
    command += ["--dataset", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="y\n" * 9, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr
    assert "code of its own" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "was run").exists()
