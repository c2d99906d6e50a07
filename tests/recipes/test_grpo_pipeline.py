"""The GRPO command: columns of hub data sets become prompts, figures are what they are named, and all stages run."""

import json

import arithmetic
import grpo
import grpo_pipeline
import pytest
from datasets import Dataset
from grpo import GRPORecipe, prompt_rows
from grpo_pipeline import Answers, measure

from rlhf.cli import parse
from rlhf.errors import InputError
from tests import tiny

GSM8K = Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}])
SYSTEM = {"role": "system", "content": "Think."}


def user(text):
    return {"role": "user", "content": text}


def test_a_question_column_becomes_the_prompt_and_the_answer_stays_for_the_rewards():
    plain = prompt_rows(GSM8K, "question", None, chat=False, setting="dataset")
    assert plain.to_list() == [{"prompt": "1 + 1?", "answer": "#### 2"}, {"prompt": "2 + 2?", "answer": "#### 4"}]
    chat = prompt_rows(GSM8K, "question", None, chat=True, setting="dataset")
    assert chat[1] == {"prompt": [user("2 + 2?")], "answer": "#### 4"}


def test_a_system_prompt_makes_a_conversation_of_texts_and_precedes_conversations():
    chat = prompt_rows(GSM8K, "question", "Think.", chat=False, setting="dataset")
    assert chat[0] == {"prompt": [SYSTEM, user("1 + 1?")], "answer": "#### 2"}
    rows = Dataset.from_list([{"prompt": [user("1 + 1?")]}])
    assert prompt_rows(rows, "prompt", "Think.", chat=False, setting="dataset")[0] == {
        "prompt": [SYSTEM, user("1 + 1?")]
    }


def test_a_prompt_column_is_left_as_it_is_unless_another_one_is_named():
    rows = Dataset.from_list([{"prompt": "old", "question": "new"}])
    assert prompt_rows(rows, "prompt", None, chat=True, setting="dataset").to_list() == rows.to_list()
    assert prompt_rows(rows, "question", None, chat=False, setting="dataset").to_list() == [{"prompt": "new"}]


def test_a_missing_prompt_column_is_named_with_those_that_there_are():
    with pytest.raises(InputError, match=r"prompt_column='query': eval_dataset has the columns question, answer"):
        prompt_rows(GSM8K, "query", None, chat=False, setting="eval_dataset")


def test_measure_counts_greedy_and_sampled_answers_by_hand(monkeypatch):
    monkeypatch.setattr(grpo_pipeline, "NUM_SAMPLES", 4)
    said = Answers(greedy=["4", "7"], sampled=[["4", "4", "5", "4"], ["6", "7", "8", "9"]], lengths=[2, 3, 2, 5])
    figures = measure(said, right=["4", "6"])
    # problem 1: 3 of 4 right, problem 2: 1 of 4; every 4 of 4 hold a right one
    assert figures == {"accuracy_greedy": 0.5, "pass@1": 0.5, "pass@4": 1.0, "completion_length": 3.0}


def test_all_stages_run_are_reused_and_refuse_other_settings(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, size in (("NUM_SFT", 128), ("NUM_TEST", 8)):
        monkeypatch.setattr(arithmetic, name, size)
    settings = ["--total_steps=2", "--prompts_per_step=2", "--grpo.completions_per_prompt=2", "--eval_every=1"]
    settings += ["--generation.max_new_tokens=4", f"--output_dir={tmp_path / 'run'}"]
    results = grpo_pipeline.run(parse(GRPORecipe, settings))
    first = capsys.readouterr().out
    assert set(results) == {"SFT", "GRPO"} and "8 held-out problems" in first
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0
    assert grpo_pipeline.run(parse(GRPORecipe, settings)) == results  # the same draws: the same figures
    assert capsys.readouterr().out.count("reusing") == 3
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        grpo_pipeline.run(parse(GRPORecipe, [*settings, "--seed=1"]))


@pytest.fixture
def user_files(tmp_path):
    """A model with a chat template, questions and a reward function, saved as a user would have them."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name, saved in (("chat", tokenizer), ("plain", tiny.tokenizer())):
        tiny.causal_lm().save_pretrained(tmp_path / name)
        saved.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"question": "ab", "answer": "c"}\n{"question": "cd", "answer": "e"}\n')
    (tmp_path / "rewards.py").write_text(
        "def has_answer(prompts, completions, answer):\n"
        "    assert all(prompt[0]['content'] == 'gh' and prompt[1]['role'] == 'user' for prompt in prompts)\n"
        "    return [float(a in c[0]['content']) for c, a in zip(completions, answer)]\n"
    )
    return tmp_path


def run_user(folder, model, *changes):
    settings = {"policy": folder / model, "dataset": folder / "rows.jsonl", "eval_dataset": folder / "rows.jsonl"}
    settings |= {"reward": f"{folder}/rewards.py:has_answer", "output_dir": folder / "out"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    arguments += [
        "--prompt_column=question",
        "--total_steps=1",
        "--prompts_per_step=2",
        "--generation.max_new_tokens=3",
    ]
    grpo.main(parse(GRPORecipe, [*arguments, *changes]))


def test_a_users_model_questions_and_reward_function_train_by_the_command(user_files):
    run_user(user_files, "chat", "--system_prompt=gh")
    assert (user_files / "out" / "policy" / "model.safetensors").is_file()
    (line,) = (user_files / "out" / "metrics.jsonl").read_text().splitlines()
    assert {"rewards/has_answer/mean", "eval/reward"} <= json.loads(line).keys()
    first = json.loads((user_files / "out" / "completions.jsonl").read_text().splitlines()[0])
    assert first["prompt"][0] == {"role": "system", "content": "gh"}


def test_a_system_prompt_needs_a_chat_template_and_the_message_says_so(user_files):
    with pytest.raises(InputError, match="chat_template"):
        run_user(user_files, "plain", "--system_prompt=gh")
    assert not (user_files / "out").exists()


def test_a_users_reward_function_cannot_end_the_run(user_files):
    (user_files / "rewards.py").write_text("import os\ndef has_answer(completions, **_): os._exit(3)\n")
    with pytest.raises(InputError, match="has_answer"):
        run_user(user_files, "chat")
