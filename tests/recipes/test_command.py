"""What both training commands do with a user's files: columns become prompts, splits are kept, mistakes are named."""

import json

import grpo
import ppo_rlhf
import pytest
from datasets import Dataset

from rlhf.commands.cli import parse
from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError
from tests import tiny

GSM8K = Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}])
SYSTEM = {"role": "system", "content": "Think."}


RECIPES = {grpo: grpo.GRPORecipe, ppo_rlhf: ppo_rlhf.PPORecipe}
both = pytest.mark.parametrize("command", RECIPES, ids=lambda command: command.__name__)


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


ANSWERED = Dataset.from_list([{"messages": [SYSTEM, user("1 + 1?"), {"role": "assistant", "content": "2"}]}])


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_the_answer_of_a_conversation_never_gets_into_the_prompt_and_there_is_one_system_turn(column):
    (row,) = prompt_rows(ANSWERED, column, "Think twice.", chat=True, setting="dataset")
    assert row == {"prompt": [{"role": "system", "content": "Think twice."}, user("1 + 1?")]}
    if column == "messages":
        (row,) = prompt_rows(ANSWERED, column, None, chat=True, setting="dataset")
        assert row == {"prompt": [SYSTEM, user("1 + 1?")]}


def test_a_prompt_that_is_nothing_is_left_for_the_trainer_to_report():
    rows = Dataset.from_list([{"question": None}, {"question": ""}])
    assert prompt_rows(rows, "question", "Think.", chat=True, setting="dataset")[0] == {"prompt": None}


def test_a_prompt_column_is_left_as_it_is_unless_another_one_is_named():
    rows = Dataset.from_list([{"prompt": "old", "question": "new"}])
    assert prompt_rows(rows, "prompt", None, chat=True, setting="dataset").to_list() == rows.to_list()
    assert prompt_rows(rows, "question", None, chat=False, setting="dataset").to_list() == [{"prompt": "new"}]


def test_a_missing_prompt_column_is_named_with_those_that_there_are():
    with pytest.raises(InputError, match=r"prompt_column='query': eval_dataset has the columns question, answer"):
        prompt_rows(GSM8K, "query", None, chat=False, setting="eval_dataset")


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


def run_user(command, folder, model, *changes):
    settings = {"policy": folder / model, "dataset": folder / "rows.jsonl", "eval_dataset": folder / "rows.jsonl"}
    settings |= {"reward": f"{folder}/rewards.py:has_answer", "output_dir": folder / "out"}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    arguments += [
        "--prompt_column=question",
        "--total_steps=1",
        "--prompts_per_step=2",
        "--update.minibatch_size=2",
        "--generation.max_new_tokens=3",
    ]
    command.main(parse(RECIPES[command], [*arguments, *changes]))


@both
def test_a_users_model_questions_and_reward_function_train_by_the_command(command, user_files):
    run_user(command, user_files, "chat", "--system_prompt=gh")
    assert (user_files / "out" / "policy" / "model.safetensors").is_file()
    (line,) = (user_files / "out" / "metrics.jsonl").read_text().splitlines()
    assert {"rewards/has_answer/mean", "eval/rewards/has_answer/mean"} <= json.loads(line).keys()
    first = json.loads((user_files / "out" / "completions.jsonl").read_text().splitlines()[0])
    assert first["prompt"][0] == {"role": "system", "content": "gh"}


@both
def test_a_system_prompt_needs_a_chat_template_and_the_message_says_so(command, user_files):
    with pytest.raises(InputError, match="chat_template"):
        run_user(command, user_files, "plain", "--system_prompt=gh")
    assert not (user_files / "out").exists()


@both
def test_a_users_reward_function_cannot_end_the_run(command, user_files):
    (user_files / "rewards.py").write_text("import os\ndef has_answer(completions, **_): os._exit(3)\n")
    with pytest.raises(InputError, match="has_answer"):
        run_user(command, user_files, "chat")


@both
def test_a_split_is_the_part_of_the_data_that_is_read(command, user_files):
    inputs = {"policy": "x", "dataset": user_files / "rows.jsonl", "eval_dataset": user_files / "rows.jsonl"}
    inputs |= {"reward": "x.py:y", "prompt_column": "question", "dataset_split": "train[1:]", "eval_split": "test[:1]"}
    config = parse(RECIPES[command], [f"--{name}={value}" for name, value in inputs.items()])
    assert config.rows("dataset", tiny.tokenizer()).to_list() == [{"prompt": "cd", "answer": "e"}]
    assert config.rows("eval_dataset", tiny.tokenizer()).to_list() == [{"prompt": "ab", "answer": "c"}]
