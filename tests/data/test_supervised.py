"""Completions to imitate and pairs to compare, as token ids; and what tokenizers must have."""

import logging

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf.data.supervised import tokenize_completions, tokenize_preferences
from rlhf.data.tokenization import require_pad_token
from rlhf.errors import InputError
from tests.data.making import CHAT, completions_of, prompts_of
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
    user,
)

# --- completions and preferences ---


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
