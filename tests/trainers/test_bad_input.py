"""Bad input to the command `recipes/ppo_rlhf.py`: one message that names the setting or row and a remedy, exit status 2,
no traceback, and nothing that was there before is changed. Every case goes through the real command in this process."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf.commands.cli import run_command
from tests import tiny

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))  # a recipe imports its neighbours, as `python recipes/x.py` lets it
REWARDS = """
def good(completions, **_): return [float(len(text)) for text in completions]
def raises(completions, **_): return [1 / 0 for text in completions]
def short(completions, **_): return [1.0]
def scalar(completions, **_): return 1.0
def text(completions, **_): return ["high" for _ in completions]
def nan(completions, **_): return [1.0, float("nan"), 1.0, 1.0]
def wants_answer(completions, answer): return [1.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("ppo_rlhf", RECIPES / "ppo_rlhf.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_rlhf"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What a run needs, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, tokenizer in (
        ("model", tiny.tokenizer()),
        ("no_pad", tiny.tokenizer(pad=None)),
    ):
        tiny.causal_lm().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for labels in (1, 2):
        AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=labels)).save_pretrained(
            folder / f"labels{labels}"
        )
    data = {
        "good": '{"prompt": "ab"}\n{"prompt": "c"}\n',
        "column": '{"text": "ab"}\n',
        "empty": "",
        "empty_prompt": '{"prompt": "ab"}\n{"prompt": ""}\n',
        "null_prompt": '{"prompt": "ab"}\n{"prompt": null}\n',
        "long": '{"prompt": "ab"}\n{"prompt": "abcdefgh"}\n',
        "broken": '{"prompt": "ab"}\n{"prompt": \n',
    }
    for name, text in data.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "lr.yaml").write_text("lr: 1e-5\n")
    (folder / "typed.yaml").write_text("total_steps: many\n")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    return folder


def run(recipe, inputs, output_dir, monkeypatch, **changes):
    settings = {
        "policy": f"{inputs}/model",
        "dataset": f"{inputs}/good.jsonl",
        "reward": f"{inputs}/rewards.py:good",
        "output_dir": output_dir,
        "total_steps": 1,
        "prompts_per_step": 4,
        "update.minibatch_size": 4,
        "generation.max_new_tokens": 3,
        **changes,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *arguments])
    run_command(recipe.PPORecipe, recipe.main)


CASES = {
    # name: (settings, what the message must say)
    "missing column": ({"dataset": "{}/column.jsonl"}, ["dataset", "prompt", "text"]),
    "empty dataset": ({"dataset": "{}/empty.jsonl"}, ["dataset", "empty.jsonl"]),
    "empty prompt": ({"dataset": "{}/empty_prompt.jsonl"}, ["dataset", "row", "1", "empt"]),
    "prompt that is null": ({"dataset": "{}/null_prompt.jsonl"}, ["dataset", "row", "1"]),
    "a line that is no JSON": ({"dataset": "{}/broken.jsonl"}, ["dataset", "broken.jsonl"]),
    "prompt over the limit": (
        {"dataset": "{}/long.jsonl", "max_prompt_tokens": 4},
        ["max_prompt_tokens=4", "row 1", "prompt_too_long"],
    ),
    "no such dataset": ({"dataset": "{}/nothing.jsonl"}, ["dataset", "nothing.jsonl"]),
    "unknown setting": ({"learning_rat": "1e-5"}, ["learning_rat", "Did you mean", "learning_rate"]),
    "mistyped setting": ({"total_steps": "many"}, ["total_steps", "many", "int"]),
    "unknown key in YAML": ({"config": "{}/lr.yaml"}, ["lr.yaml", "line 1", "'lr'"]),
    "mistyped value in YAML": ({"config": "{}/typed.yaml", "total_steps": None}, ["total_steps", "many", "int"]),
    "a key twice in YAML": ({"config": "{}/twice.yaml"}, ["seed", "second time"]),
    "setting out of range": ({"ppo.clip_range": "-0.2"}, ["clip_range", "-0.2", "above 0"]),
    "batch sizes that do not fit": ({"update.minibatch_size": 3}, ["minibatch_size=3", "4 completions"]),
    "missing_eos without its value": ({"missing_eos": "replace"}, ["missing_eos_value", "replace"]),
    "reward that raises": ({"reward": "{}/rewards.py:raises"}, ["raises", "row 0", "division by zero"]),
    "reward of the wrong length": ({"reward": "{}/rewards.py:short"}, ["short", "1", "4"]),
    "reward that is one number": ({"reward": "{}/rewards.py:scalar"}, ["scalar", "list"]),
    "reward of text": ({"reward": "{}/rewards.py:text"}, ["text", "row 0", "high"]),
    "reward that is NaN": ({"reward": "{}/rewards.py:nan"}, ["nan", "row 1"]),
    "reward that needs a missing column": ({"reward": "{}/rewards.py:wants_answer"}, ["wants_answer", "answer"]),
    "reward that does not exist": ({"reward": "{}/rewards.py:goood"}, ["goood", "Did you mean", "good"]),
    "no reward": ({"reward": None}, ["reward", "--reward file.py:name"]),
    "no policy": ({"policy": None}, ["policy", "embedded"]),
    "missing model path": ({"policy": "{}/nowhere"}, ["policy", "nowhere", "save_pretrained"]),
    "reward model with two labels": (
        {"reward": None, "reward_model": "{}/labels2"},
        ["reward_model", "2 labels", "num_labels=1"],
    ),
    "a language model as reward model": (
        {"reward": None, "reward_model": "{}/model"},
        ["reward_model", "not a sequence classifier"],
    ),
    "more tokens than the model has positions for": (
        {"generation.max_new_tokens": 100},
        ["generation.max_new_tokens=100", "64"],
    ),
    "nothing to resume": ({"resume": "true"}, ["resume", "output_dir"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_message_that_names_it_and_touches_nothing(
    case, recipe, inputs, tmp_path, monkeypatch, capsys
):
    changes, parts = CASES[case]
    keep = tmp_path / "out" / "mine.txt"
    keep.parent.mkdir()
    keep.write_text("a user's file")
    changes = {k: v.format(inputs) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stopped:
        run(recipe, inputs, keep.parent, monkeypatch, **changes)
    message = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and len(message) < 700, message
    assert keep.read_text() == "a user's file"
    assert not (keep.parent / "policy").exists()


def test_a_finished_run_is_neither_repeated_nor_overwritten_unasked(recipe, inputs, tmp_path, monkeypatch, capsys):
    run(recipe, inputs, tmp_path / "out", monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run(recipe, inputs, tmp_path / "out", monkeypatch, seed=1)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "already holds a run" in message and "overwrite" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_learning_rate_of_1e_5_in_yaml_is_a_number(recipe, inputs, tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 1e-5\n")  # PyYAML alone reads the text '1e-5'
    run(recipe, inputs, tmp_path / "out", monkeypatch, config=file)
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["learning_rate"] == 1e-5


def test_a_tokenizer_without_pad_token_trains_and_a_line_says_what_was_borrowed(
    recipe, inputs, tmp_path, monkeypatch, capsys
):
    run(recipe, inputs, tmp_path / "out", monkeypatch, policy=f"{inputs}/no_pad")
    assert "pad" in capsys.readouterr().out
