"""Data: what is read, how text becomes ids, the order of prompts, and what bad rows and files say."""

import hashlib
import json
import logging
import struct

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import ListRows, load_rows
from rlhf.data.supervised import tokenize_completions, tokenize_preferences
from rlhf.data.tokenization import require_pad_token
from rlhf.errors import InputError
from tests.data.texts import (
    BOS,
    BOS_TEMPLATE,
    EOS,
    EOS_LINE_TEMPLATE,
    EOS_TEMPLATE,
    PLAIN_TEMPLATE,
    assistant,
    ids,
    make_tokenizer,
    system,
    user,
)

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Files that datasets converts must not outlive the test; and no test may ask the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows_of(*values, column="prompt"):
    return Dataset.from_list([{column: value} for value in values])


def prompts_of(rows, tokenizer=None, **options):
    return PromptDataset.build(rows, tokenizer or make_tokenizer(), **({"max_prompt_tokens": 64} | options))


def assert_says(error, *parts):
    for part in parts:
        assert part in str(error.value)


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

CHAT = make_tokenizer(template=PLAIN_TEMPLATE)


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


# --- prompts ---


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, BOS_TEMPLATE])
def test_there_is_exactly_one_bos_whoever_adds_it(adds_bos, template):
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    expected = adds_bos or template is BOS_TEMPLATE
    found = prompts_of(rows_of([user("a")]), tokenizer)[0].ids
    assert found == [BOS] * expected + ids("<|user|> a <|end|> <|assistant|>")


@pytest.mark.parametrize("text", ["a b", "<s> a b"])
def test_plain_text_has_the_bos_of_the_tokenizer_once(text):
    assert prompts_of(rows_of(text), make_tokenizer(adds_bos=True))[0].ids == [BOS, *ids("a b")]


def test_messages_up_to_a_final_assistant_turn_are_the_prompt():
    conversation = [user("a"), assistant("b"), user("c")]
    with_answer, without = [*conversation, assistant("d")], conversation
    found = prompts_of(rows_of(with_answer, without, column="messages"), CHAT)
    assert found[0].prompt == found[1].prompt == conversation
    assert (
        found[0].ids
        == found[1].ids
        == ids("<|user|> a <|end|> <|assistant|> b <|end|> <|user|> c <|end|> <|assistant|>")
    )
    assert found[0].columns == {"messages": with_answer}


def test_a_prompt_that_ends_in_an_assistant_turn_is_continued_there():
    assert prompts_of(rows_of([user("a"), assistant("b")]), CHAT)[0].ids == ids("<|user|> a <|end|> <|assistant|> b")


def test_pairs_without_a_prompt_give_the_messages_they_share():
    rows = Dataset.from_list([{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}])
    assert prompts_of(rows, CHAT)[0].prompt == [user("a")]


def test_other_columns_and_the_prompt_come_back_as_they_were_written(tmp_path):
    written = {"prompt": [user("a"), {**user("b"), "name": "z"}], "answer": 42, "tags": ["x", "y"]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(written) + "\n")
    prompt = prompts_of(load_rows(path), CHAT)[0]
    assert prompt.prompt == written["prompt"]
    assert prompt.columns == {"answer": 42, "tags": ["x", "y"]}
    assert prompts_of(Dataset.from_list([written]), CHAT)[0].prompt == written["prompt"]  # arrow fills name with None


def test_unicode_and_odd_spaces_reach_reward_functions_unchanged():
    text = "  ünïcode \t\u00a0🙂\n a  "
    assert prompts_of(rows_of(text))[0].prompt == text


# --- prompts that are too long ---

LONG = Dataset.from_list([{"prompt": "a b", "n": 0}, {"prompt": "a b c d e f", "n": 1}, {"prompt": "c", "n": 2}])


def test_a_long_prompt_is_an_error_by_default():
    with pytest.raises(InputError) as error:
        prompts_of(LONG, max_prompt_tokens=3)
    assert_says(error, "1 of 3 prompts", "max_prompt_tokens=3", "row 1 with 6 tokens", "drop or truncate_left")


def test_long_prompts_are_dropped_with_their_columns_and_counted():
    found = prompts_of(LONG, max_prompt_tokens=3, prompt_too_long="drop")
    assert [(p.prompt, p.columns["n"]) for p in found] == [("a b", 0), ("c", 2)]
    assert (len(found), found.dropped, found.truncated) == (2, 1, 0)


def test_dropping_every_prompt_is_an_error():
    with pytest.raises(InputError, match=r"all 3 prompts.*max_prompt_tokens=0|at least 1 token"):
        prompts_of(LONG, max_prompt_tokens=0, prompt_too_long="drop")
    with pytest.raises(InputError, match="none is left"):
        prompts_of(rows_of("a b c"), max_prompt_tokens=2, prompt_too_long="drop")


def test_truncation_keeps_the_end_and_the_bos():
    found = prompts_of(LONG, make_tokenizer(adds_bos=True), max_prompt_tokens=4, prompt_too_long="truncate_left")
    assert [p.ids for p in found] == [[BOS, *ids("a b")], [BOS, *ids("d e f")], [BOS, *ids("c")]]
    assert (found.dropped, found.truncated, found[1].prompt) == (0, 1, "a b c d e f")


def test_truncation_of_a_conversation_drops_whole_turns_and_keeps_the_system_message():
    turns = [system("sys"), user("a"), assistant("b"), user("c d"), assistant("e"), user("f")]
    whole = prompts_of(rows_of(turns), CHAT)[0].ids
    first, last = ids("<|system|> sys <|end|>"), ids("<|user|> f <|end|> <|assistant|>")
    two = [*first, *ids("<|user|> c d <|end|> <|assistant|> e <|end|>"), *last]
    for limit in range(len(first + last), len(whole)):
        found = prompts_of(rows_of(turns), CHAT, max_prompt_tokens=limit, prompt_too_long="truncate_left")[0].ids
        assert found == (two if limit >= len(two) else first + last)
    with pytest.raises(InputError, match=r"row 0: its last user turn alone.*max_prompt_tokens=6.*drop"):
        prompts_of(rows_of(turns), CHAT, max_prompt_tokens=6, prompt_too_long="truncate_left")


# --- order ---


@pytest.fixture(scope="module")
def seven():
    return prompts_of(rows_of(*"abcdefg"))


def test_every_epoch_visits_every_prompt_once_in_its_own_order(seven):
    epochs = [seven.step_indices(7 * epoch, 7, seed=3) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seven.step_indices(0, 7, seed=4) != epochs[0]


@pytest.mark.parametrize("sizes", [[1] * 20, [3, 4, 5, 8], [7, 7, 6], [19, 1], [0, 20]])
def test_the_order_does_not_depend_on_how_steps_are_cut(seven, sizes):
    cursor, visited = 0, []
    for size in sizes:
        visited += seven.step_indices(cursor, size, seed=0)
        cursor += size
    assert visited == seven.step_indices(0, 20, seed=0)


def test_the_fingerprint_of_the_content_is_of_prompts_and_columns_as_reward_functions_see_them():
    def of(**changes):
        rows = [{"prompt": "a", "answer": 1, "hint": ["x"]}, {"prompt": "b", "answer": 2, "hint": ["y"]}]
        rows[1] |= changes
        return prompts_of(Dataset.from_list(rows)).content_fingerprint

    assert of() == of()
    others = [of(answer=3), of(hint=["x"]), of(hint=["y", "y"]), of(prompt="c")]
    assert len({of(), *others}) == 5


class Thing:
    """As a picture or an object of the user's: JSON does not know it."""


def test_the_fingerprint_of_the_content_is_the_same_for_the_same_data_in_every_process():
    """Neither an address in memory nor the order of a set counts; the numbers of an array do."""

    def fingerprint(**columns):
        return prompts_of(ListRows([{"prompt": "a", **columns}], "dataset")).content_fingerprint

    assert fingerprint(x=Thing()) == fingerprint(x=Thing())
    assert fingerprint(x=set("abc")) == fingerprint(x=set("cba")) != fingerprint(x=set("ab"))
    assert fingerprint(x=np.arange(3)) == fingerprint(x=np.arange(3)) != fingerprint(x=np.arange(1, 4))
    assert fingerprint(x=np.array([Thing()], dtype=object)) == fingerprint(x=np.array([Thing()], dtype=object))
    assert fingerprint(x={1: {"b", "a"}, "k": 3}) == fingerprint(x={"k": 3, 1: {"a", "b"}})
    assert fingerprint(x={1: 2, "k": 3}) == fingerprint(x={1: 2, "k": 3}) != fingerprint(x={1: 2, "k": 4})


def test_the_fingerprint_is_of_the_ids_and_their_grouping_alone(seven):
    by_hand = hashlib.sha256(b"".join(struct.pack("<2q", 1, *ids(letter)) for letter in "abcdefg")).hexdigest()
    assert seven.fingerprint == by_hand
    assert seven.fingerprint != prompts_of(rows_of(*"abcdegf")).fingerprint
    assert prompts_of(rows_of("a b", "c")).fingerprint != prompts_of(rows_of("a", "b c")).fingerprint


# --- completions and preferences ---


def completions_of(rows, tokenizer=None, max_tokens=64):
    return tokenize_completions(Dataset.from_list(rows), tokenizer or make_tokenizer(), max_tokens=max_tokens)


@pytest.mark.parametrize("completion", ["c d", "c d </s>", "c d </s> \n"])
def test_eos_is_appended_once_and_trained(completion):
    row = completions_of([{"prompt": "a b", "completion": completion}])[0]
    assert row["input_ids"] == [*ids("a b c d"), EOS]
    assert row["labels"] == [-100, -100, *ids("c d"), EOS]


def test_an_empty_completion_trains_the_eos_alone():
    assert completions_of([{"prompt": "a", "completion": ""}])[0]["labels"] == [-100, EOS]


def test_eos_is_trained_also_when_it_is_the_pad_token():
    row = completions_of([{"prompt": "a", "completion": "b"}], make_tokenizer(pad_token="</s>"))[0]
    assert row["labels"] == [-100, *ids("b"), EOS]


@pytest.mark.parametrize(
    ("template", "end"),
    [(PLAIN_TEMPLATE, "<|end|> </s>"), (EOS_TEMPLATE, "</s>"), (EOS_LINE_TEMPLATE, "</s>")],
)
@pytest.mark.parametrize("column", ["messages", "prompt and completion", "text completion"])
def test_a_conversation_ends_in_eos_once_whatever_the_template_writes(template, end, column):
    rows = {
        "messages": {"messages": [user("a"), assistant("b")]},
        "prompt and completion": {"prompt": [user("a")], "completion": [assistant("b")]},
        "text completion": {"prompt": [user("a")], "completion": "b"},
    }
    row = completions_of([rows[column]], make_tokenizer(template=template))[0]
    assert row["labels"][-len(end.split()) - 1 :] == ids(f"b {end}")
    assert all(label == -100 for label in row["labels"][: -len(end.split()) - 1])


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, BOS_TEMPLATE, EOS_TEMPLATE, EOS_LINE_TEMPLATE])
@pytest.mark.parametrize("conversational", [False, True])
def test_prompt_ids_are_the_same_in_every_use(adds_bos, template, conversational):
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    prompt = [user("a b"), assistant("c"), user("d")] if conversational else "a b c d"
    good, bad = ([assistant("e")], [assistant("f g")]) if conversational else ("e", "f g")
    rows = Dataset.from_list([{"prompt": prompt, "completion": good, "chosen": good, "rejected": bad}])
    start = prompts_of(rows, tokenizer)[0].ids
    sft = tokenize_completions(rows, tokenizer, max_tokens=64)[0]
    pair = tokenize_preferences(rows, tokenizer, max_tokens=64)[0]
    for sequence in (sft["input_ids"], pair["chosen_ids"], pair["rejected_ids"]):
        assert sequence[: len(start)] == start
    assert sft["labels"] == [-100] * len(start) + sft["input_ids"][len(start) :]
    assert sft["input_ids"] == pair["chosen_ids"]
    assert sft["input_ids"].count(BOS) == (adds_bos or (conversational and template is BOS_TEMPLATE))


def test_a_token_never_joins_the_end_of_the_prompt_and_the_start_of_the_answer():
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "bc": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    joins = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)
    assert joins("abcd")["input_ids"] == [2, 6, 5]
    for row in ({"prompt": "ab", "completion": "cd"}, {"messages": [user("ab"), assistant("cd")]}):
        assert completions_of([row], joins)[0] == {"input_ids": [2, 3, 4, 5, 1], "labels": [-100, -100, 4, 5, 1]}


def test_a_template_that_rewrites_the_prompt_is_refused_with_the_row():
    rewriting = "{% if add_generation_prompt %}<|system|>{% endif %}" + PLAIN_TEMPLATE
    with pytest.raises(
        InputError, match=r"row 0: the chat template writes the prompt differently.*Use a chat_template"
    ):
        completions_of([{"messages": [user("a"), assistant("b")]}], make_tokenizer(template=rewriting))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("a")]}, "do not end with an assistant turn"),
        ({"prompt": "a", "completion": None}, "None, neither"),
        ({"prompt": "a", "completion": [assistant("b")]}, "write both in the same way"),
    ],
)
def test_a_bad_completion_is_named_by_its_row(row, reason):
    with pytest.raises(InputError, match=rf"row 0: .*{reason}"):
        completions_of([row], CHAT)


def test_long_rows_are_dropped_with_a_count_and_an_error_if_none_is_left(caplog):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b c d e"}]
    with caplog.at_level(logging.WARNING):
        assert len(completions_of(rows, max_tokens=3)) == 1
    assert "dropped 1 of 2 rows longer than 3 tokens" in caplog.text
    with pytest.raises(InputError, match=r"all 2 rows are longer than max_tokens=2 \(the shortest has 3"):
        completions_of(rows, max_tokens=2)


CHOSEN, REJECTED = [user("a"), assistant("b")], [user("a"), assistant("c d")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": "a", "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": [user("a")], "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": [user("a")], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
    ],
)
def test_pairs_are_the_same_however_the_prompt_is_given(row):
    pair = tokenize_preferences(Dataset.from_list([row]), CHAT, max_tokens=64)[0]
    assert pair["chosen_ids"] == [*ids("<|user|> a <|end|> <|assistant|> b <|end|>"), EOS]
    assert pair["rejected_ids"] == [*ids("<|user|> a <|end|> <|assistant|> c d <|end|>"), EOS]


def test_plain_pairs_without_a_prompt_are_compared_as_whole_texts():
    rows = Dataset.from_list([{"chosen": "a b", "rejected": "a c d"}])
    pair = tokenize_preferences(rows, make_tokenizer(adds_bos=True), max_tokens=64)[0]
    assert pair == {"chosen_ids": [BOS, *ids("a b"), EOS], "rejected_ids": [BOS, *ids("a c d"), EOS]}


def test_conversations_that_share_no_message_name_the_row():
    rows = Dataset.from_list([{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}])
    with pytest.raises(InputError, match=r"row 0: chosen and rejected that begin with different messages"):
        tokenize_preferences(rows, CHAT, max_tokens=64)


# --- tokenizers ---


def test_a_missing_pad_token_is_borrowed_and_said():
    tokenizer = make_tokenizer(pad_token=None)
    assert "no pad token" in require_pad_token(tokenizer) and tokenizer.pad_token_id == EOS
    assert require_pad_token(make_tokenizer()) is None


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match=r"eos_token.*Set tokenizer.eos_token"):
        require_pad_token(make_tokenizer(eos_token=None))
