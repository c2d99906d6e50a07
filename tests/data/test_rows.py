"""Rows are read from every kind of path and list, and bad ones are named."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from rlhf.data.rows import ListRows, load_rows
from rlhf.data.supervised import tokenize_completions, tokenize_preferences
from rlhf.errors import InputError
from tests.data.making import CHAT, assert_says, prompts_of, rows_of
from tests.data.texts import (
    PLAIN_TEMPLATE,
    make_tokenizer,
    system,
    user,
)

# --- reading ---


ROWS = [{"prompt": "a b", "n": 1}, {"prompt": "ü \t  émoji 🙂", "n": 2}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "saved", "saved splits", "directory"])
def test_rows_are_read_from_every_kind_of_path(tmp_path, kind):
    data = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "csv":
        data.to_csv(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "saved splits":
        DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    else:
        path.mkdir()
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (path / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert load_rows(path).to_list() == ROWS
    assert load_rows(path, "train[1:]").to_list() == ROWS[1:]
    if kind in ("saved splits", "directory"):
        assert load_rows(str(path), "test").to_list() == ROWS[:1]


def test_a_file_is_all_one_split_and_slices_work(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(10)))
    assert load_rows(path, "validation")["n"][:] == list(range(10))
    assert load_rows(path, "train[2:4]")["n"][:] == [2, 3]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("absent.jsonl", None, ["does not exist", "Give a file"]),
        ("absent/rows", None, ["does not exist", "Give a file"]),
        ("empty.jsonl", "", ["empty", "at least one row"]),
        ("header.csv", "prompt,n\n", ["header.csv", "no"]),
        ("none.json", "[]", ["none.json"]),
        ("rows.txt", "a\n", ["'.txt'", ".jsonl, .json, .parquet, .csv"]),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["cannot be read", "Line 2 is not JSON"]),
        ("numbers.jsonl", "1\n2\n", ["cannot be read", "Line 1 is not a JSON object"]),
        ("broken.parquet", "no parquet", ["cannot be read"]),
    ],
)
def test_an_unreadable_file_names_setting_value_and_remedy(tmp_path, name, content, parts):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        load_rows(path, setting="eval_dataset")
    assert_says(error, "eval_dataset=", str(path), *parts)


def test_a_split_that_is_not_there_lists_those_that_are(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"prompt": "a"}\n')
    for directory in ("saved", "files"):
        with pytest.raises(InputError, match=r"'test'.*train|\"test\".*train"):
            load_rows(tmp_path / directory, "test")


def test_a_hub_name_that_cannot_be_reached_is_an_input_error(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as error:
        load_rows("someone/prompts:main", "test", setting="dataset")
    assert_says(error, "dataset='someone/prompts:main'", "Couldn't reach the Hub", "network")
    assert asked == [(("someone/prompts", "main"), {"split": "test"})]


@pytest.mark.parametrize("name", ["prompts.jsonl", "./data/prompts", "/data/prompts", "~/data", "a/b/c", "typo"])
def test_what_can_only_be_a_path_is_never_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="does not exist"):
        load_rows(name)


# --- rows given as a list ---


LISTED = [{"prompt": "a b", "n": [1, 2], "extra": {"k": 3}}, {"prompt": "c"}, {"n": None, "prompt": "d e"}]


def test_a_list_of_rows_is_what_a_dataset_of_them_is():
    given, wanted = (prompts_of(rows) for rows in (ListRows(LISTED, "dataset"), Dataset.from_list(LISTED)))
    assert [given[i] for i in range(3)] == [wanted[i] for i in range(3)]
    assert given.fingerprint == wanted.fingerprint and given.content_fingerprint == wanted.content_fingerprint


def test_a_column_that_only_a_later_row_of_a_list_has_is_none_in_the_others():
    assert prompts_of(ListRows(LISTED[::-1], "dataset"))[0].columns == {"n": None, "extra": None}


def test_rows_of_a_list_are_copied_when_they_come_in_and_when_they_are_handed_out():
    mine = [{"prompt": "a", "n": [1]}]
    prompts = prompts_of(ListRows(mine, "dataset"))
    mine[0]["n"].append(2)
    prompts[0].columns["n"].append(3)
    assert prompts[0].columns == {"n": [1]}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "a"}, "b"], r"dataset: row 1 .*type str.*mapping"),
        ([{"prompt": "a", "lock": (i for i in ())}], r"dataset: row 0 .*cannot be copied.*plain values"),
        ([{"text": "a"}], "prompt"),
        ([], "no rows"),
    ],
)
def test_a_list_that_cannot_be_used_is_an_input_error(rows, reason):
    with pytest.raises(InputError, match=reason):
        prompts_of(ListRows(rows, "dataset"))


# --- columns and bad rows ---


@pytest.mark.parametrize(
    ("columns", "build", "parts"),
    [
        (["promt", "n"], prompts_of, ["prompt or messages", "found promt, n", "Did you mean 'prompt' by 'promt'?"]),
        (["question"], prompts_of, ["prompt or messages", "found question", "Rename"]),
        (["prompt", "completions"], "completion", ["prompt + completion or messages", "'completion' by 'completions'"]),
        (["message"], "completion", ["found message", "'messages' by 'message'"]),
        (["prompt", "chosen"], "preference", ["chosen + rejected", "found prompt, chosen"]),
        (["chosen", "reject"], "preference", ["chosen + rejected", "'rejected' by 'reject'"]),
    ],
)
def test_a_missing_column_lists_required_found_and_nearest(columns, build, parts):
    rows = Dataset.from_list([dict.fromkeys(columns, "a")])
    makers = {"completion": tokenize_completions, "preference": tokenize_preferences}
    with pytest.raises(InputError) as error:
        build(rows) if callable(build) else makers[build](rows, make_tokenizer(), max_tokens=9, setting="dataset")
    assert_says(error, "dataset: ", *parts)


def json_rows(tmp_path, *values):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    return load_rows(path)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("", "an empty prompt"),
        (None, "None, neither a string nor a list of messages"),
        (3, "3, neither a string nor a list of messages"),
        (["a"], "a message without a role"),
        ([], "no messages"),
        ([{"role": "user"}], "a message without a role and a content string"),
        ([{"role": "user", "content": 3}], "a message without a role and a content string"),
        (" ", "gives no tokens"),
    ],
)
def test_a_bad_prompt_is_named_by_its_row(tmp_path, bad, reason):
    with pytest.raises(InputError) as error:
        prompts_of(json_rows(tmp_path, "a", bad, "b"), CHAT, setting="eval_dataset")
    assert_says(
        error, "eval_dataset: 1 of 3 prompts", f"row 1: {reason}" if bad != " " else "row 1: ' '", reason, "Repair"
    )


def test_many_bad_rows_are_counted_and_the_first_are_named():
    with pytest.raises(InputError) as error:
        prompts_of(rows_of("a", *[""] * 7, None))
    assert_says(error, "8 of 9 prompts", "row 1, 2, 3, 4 and 3 more: an empty prompt", "row 8: None")


def test_an_empty_data_set_is_an_error_everywhere():
    rows = Dataset.from_dict({"prompt": [], "completion": [], "chosen": [], "rejected": []})
    for make in (tokenize_completions, tokenize_preferences):
        with pytest.raises(InputError, match="has no rows"):
            make(rows, make_tokenizer(), max_tokens=9)
    with pytest.raises(InputError, match="has no rows"):
        prompts_of(rows)


def test_conversations_without_a_chat_template_name_the_remedy():
    with pytest.raises(InputError, match=r"rows? 0.*no chat template.*chat_template"):
        prompts_of(rows_of([user("a")]))


def test_a_template_that_refuses_a_conversation_names_the_row():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN_TEMPLATE
    with pytest.raises(InputError, match=r"row 1: .*user first"):
        prompts_of(rows_of([user("a")], [system("sys"), user("a")]), make_tokenizer(template=strict))
