"""Prompts as token ids: what they hold, what is cut, and in which order they are drawn."""

import hashlib
import json
import struct

import numpy as np
import pytest
from datasets import Dataset

from rlhf.data.rows import ListRows, load_rows
from rlhf.errors import InputError
from tests.data.making import CHAT, assert_says, prompts_of, rows_of
from tests.data.texts import (
    BOS,
    BOS_TEMPLATE,
    PLAIN_TEMPLATE,
    assistant,
    ids,
    make_tokenizer,
    system,
    user,
)

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
