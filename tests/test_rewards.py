"""Rewards: the signature users have, every bad answer named, and reward models that padding cannot change."""

import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf.errors import InputError
from rlhf.rewards import RewardModel, Rewards, completion_texts, load_reward_function
from tests.texts import BOS_TEMPLATE, EOS, PAD, PLAIN_TEMPLATE, WORDS, assistant, ids, make_tokenizer, user

PROMPTS = ["the first prompt", "the second", "the third", "the fourth"]
COMPLETIONS = ["a", "b b", "c c c", "d"]


def call(rewards, rows=4, **options):
    return rewards(
        prompts=PROMPTS[:rows],
        completions=COMPLETIONS[:rows],
        completion_ids=[[1]] * rows,
        **options,
    )


def returns(answer):
    def scorer(completions, **columns):
        return answer

    return scorer


# --- what a function is given ---


def test_a_function_gets_the_keywords_users_know():
    seen = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_extra"]("length", [len(c) for c in completions])
        kwargs["log_metric"]("longest", 5)
        kwargs["log_metric"]("longest", 7)
        return [float(answer) for answer in kwargs["answer"]]

    result = call(Rewards(reward), columns={"answer": [1, 2, 3, 4]}, trainer_state="state", prompt_ids=[[0]] * 4)
    assert set(seen) == {
        "prompts",
        "completions",
        "completion_ids",
        "answer",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
    assert (seen["prompts"], seen["completions"], seen["answer"]) == (PROMPTS, COMPLETIONS, [1, 2, 3, 4])
    assert seen["trainer_state"] == "state"
    assert result.scores == [1, 2, 3, 4] and result.extra == {"length": [1, 3, 5, 1]}
    assert result.metrics["custom/longest"] == 6 and result.totals["custom/longest"] == (12, 2)


def by_length(completions, bonus=0.0):
    return [len(text) + bonus for text in completions]


class Judge:
    def __call__(self, completions, answer):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("function", "expected", "name"),
    [
        (by_length, [1, 3, 5, 1], "by_length"),
        (functools.partial(by_length, bonus=1.0), [2, 4, 6, 2], "by_length"),
        (Judge(), [1, 0, 0, 1], "Judge"),
        (lambda prompt_ids: [len(p) for p in prompt_ids], [2, 2, 2, 2], "<lambda>"),
    ],
)
def test_a_function_without_kwargs_gets_only_what_it_names(function, expected, name):
    result = call(Rewards(function), columns={"answer": ["a", "x", "x", "d"]}, prompt_ids=[[0, 0]] * 4)
    assert result.scores == expected and list(result.per_function) == [name]


@pytest.mark.parametrize(
    ("function", "columns", "parts"),
    [
        (Judge(), ["anwser"], ["'Judge'", "'answer'", "columns anwser", "Did you mean 'anwser'"]),
        (lambda texts: [], [], ["'texts'", "none", "Rename the parameter"]),
        (by_length, ["completions"], ["'completions'", "Rename it"]),
    ],
)
def test_a_function_that_cannot_be_called_is_known_before_anything_is_generated(function, columns, parts):
    with pytest.raises(InputError) as error:
        Rewards(function).check_columns(columns)
    for part in parts:
        assert part in str(error.value)


def test_a_positional_only_parameter_is_refused():
    def reward(completions, /):
        return [0.0]

    with pytest.raises(InputError, match=r"'reward'.*'completions'.*Remove the /"):
        Rewards(reward)


# --- several functions ---


def test_weights_and_abstentions():
    first, second = returns([1.0, None, 3.0, None]), returns([10.0, 20.0, None, 40.0])
    result = call(Rewards([first, second], weights=[2.0, 0.5], names=["first", "second"]))
    assert result.scores == [7.0, 10.0, 6.0, 20.0]
    assert result.per_function == {"first": [1.0, None, 3.0, None], "second": [10.0, 20.0, None, 40.0]}
    assert result.totals["rewards/first/mean"] == (4.0, 2.0) and result.metrics["rewards/first/mean"] == 2.0
    assert result.metrics["rewards/first/abstained"] == 0.5 and result.metrics["rewards/unscored"] == 0.0


def test_equal_names_are_numbered():
    assert Rewards([by_length, by_length, Judge(), by_length]).names == [
        "by_length",
        "by_length_2",
        "Judge",
        "by_length_3",
    ]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"functions": []}, ["at least one"]),
        ({"functions": [by_length, "text"]}, ["'text'", "cannot be called"]),
        ({"functions": [by_length], "weights": [1.0, 2.0]}, ["reward_weights=[1.0, 2.0]", "each of 1"]),
        ({"functions": [by_length], "weights": [math.nan]}, ["reward_weights=[nan]", "finite"]),
        ({"functions": [by_length, Judge()], "names": ["x", "x"]}, ["['x', 'x']", "2 different names"]),
    ],
)
def test_bad_settings_name_themselves(options, parts):
    functions = options.pop("functions")
    with pytest.raises(InputError) as error:
        Rewards(functions, **options)
    for part in parts:
        assert part in str(error.value)


def test_a_row_without_any_score_is_an_error_or_counted():
    rewards = Rewards([returns([1.0, None, 3.0, None]), returns([None, None, 3.0, 1.0])])
    with pytest.raises(InputError, match=r"1 of 4 completions have no score.*row 1 \(prompt 'the second'\).*number"):
        call(rewards)
    result = call(rewards, allow_unscored=True)
    assert math.isnan(result.scores[1]) and result.scores[0] == 1.0
    assert result.totals["rewards/unscored"] == (1, 4)
    nothing = call(
        Rewards(returns([None] * 4)), allow_unscored=True
    )  # the trainer looks at all processes' rows together
    assert all(map(math.isnan, nothing.scores)) and nothing.totals["rewards/unscored"] == (4, 4)


# --- what a function returns ---


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.0, True, False],
        (1, 2.0, 1, 0),
        np.array([1, 2, 1, 0]),
        np.array([1, 2, 1, 0], dtype=np.float16),
        torch.tensor([1, 2, 1, 0]),
        torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1), np.int64(2), np.bool_(True), np.float64(0)],
        [torch.tensor(1), torch.tensor(2.0), np.array(1), torch.tensor(False)],
    ],
)
def test_every_usual_kind_of_number_is_a_score(answer):
    scores = call(Rewards(returns(answer))).scores
    assert scores == [1.0, 2.0, 1.0, 0.0] and all(type(score) is float for score in scores)


WHOLE = ["'scorer'", "Return a list", "4 completions"]
ROW = ["'scorer'", "row 2", "'the third'", "finite number", "None"]


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (None, ["NoneType", *WHOLE]),
        (1.0, ["float 1.0", *WHOLE]),
        ("1234", ["str '1234'", *WHOLE]),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, ["dict", *WHOLE]),
        ({1.0, 2.0, 3.0, 4.0}, ["set", *WHOLE]),
        ((x for x in [1.0] * 4), ["generator", *WHOLE]),
        ([1.0] * 3, ["3 scores for 4", *WHOLE]),
        ([], ["0 scores for 4", *WHOLE]),
        (torch.ones(4, 1), ["shape (4, 1)", *WHOLE]),
        (np.ones((4, 2)), ["shape (4, 2)", *WHOLE]),
        (torch.tensor(1.0), ["shape ()", *WHOLE]),
        (torch.ones(3), ["3 scores for 4", *WHOLE]),
        ([1.0, 2.0, math.nan, 4.0], ["nan", *ROW]),
        ([1.0, 2.0, math.inf, 4.0], ["inf", *ROW]),
        ([1.0, 2.0, -3e38, 4.0], ["-3e+38", *ROW]),
        ([1.0, 2.0, 10**400, 4.0], ["10000", *ROW]),
        ([1.0, 2.0, "3", 4.0], ["'3'", *ROW]),
        ([1.0, 2.0, [3.0], 4.0], ["[3.0]", *ROW]),
        ([1.0, 2.0, 3 + 0j, 4.0], ["(3+0j)", *ROW]),
        ([1.0, 2.0, torch.ones(1), 4.0], ["tensor([1.])", *ROW]),
        (torch.tensor([1.0, 2.0, math.nan, 4.0]), ["nan", *ROW]),
        (np.array(["1", "2", "3", "4"]), ["'1'", "row 0"]),
    ],
)
def test_a_bad_answer_names_function_value_and_remedy(answer, parts):
    with pytest.raises(InputError) as error:
        call(Rewards(returns(answer)))
    for part in parts:
        assert part in str(error.value)


def fails_on_c(completions, **columns):
    return [1 / text.count("c") if "c" in text else {}["missing"] if text == "d" else 0.0 for text in completions]


def test_a_function_that_raises_is_named_with_row_line_and_cause():
    with pytest.raises(InputError) as error:
        call(Rewards([by_length, fails_on_c]))
    line = fails_on_c.__code__.co_firstlineno + 1
    for part in ("'fails_on_c' raised KeyError", f"test_rewards.py:{line}", "row 3", "'the fourth'", "'d'", "Repair"):
        assert part in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_function_that_raises_only_on_the_whole_batch_says_so():
    def picky(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(InputError, match=r"'picky' raised RuntimeError: too many.*only on the whole batch.*the first"):
        call(Rewards(picky))


@pytest.mark.parametrize("tool", ["log_extra", "log_metric"])
def test_bad_logging_is_named(tool):
    def logs(completions, log_extra, log_metric):
        log_extra("lengths", [1]) if tool == "log_extra" else log_metric("lengths", math.nan)
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=rf"{tool}\('lengths'\).*Give"):
        call(Rewards(logs))


# --- async ---


def test_async_functions_run_at_the_same_time_as_each_other_and_as_sync_ones():
    running, all_seen = 0, threading.Event()

    async def slow(completions, **columns):
        nonlocal running
        running += 1
        for _ in range(1500):  # waits for the sync function, which waits for all three
            await asyncio.sleep(0.001)
            if all_seen.is_set():
                return [1.0] * len(completions)
        return [0.0] * len(completions)

    class Slow:
        async def __call__(self, completions):
            return await slow(completions)

    def sync(completions):
        for _ in range(1500):
            time.sleep(0.001)
            if running == 3:
                all_seen.set()
                return [1.0] * len(completions)
        return [0.0] * len(completions)

    assert call(Rewards([sync, slow, Slow(), functools.partial(slow)])).scores == [4.0] * 4


def test_async_functions_work_inside_a_running_loop_and_keep_their_loop():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    rewards = Rewards(reward)

    async def notebook():
        return call(rewards).scores

    assert asyncio.run(notebook()) == [1.0] * 4
    call(rewards)
    assert loops[0] is loops[1] and not loops[0].is_closed()  # a client opened in step 1 works in step 2


def test_an_async_function_that_raises_is_named_with_its_row():
    async def judge(completions):
        await asyncio.sleep(0)
        return [1.0 if "c" not in text else 1 / 0 for text in completions]

    with pytest.raises(
        InputError, match=r"'judge' raised ZeroDivisionError.*test_rewards.py:\d+\).*row 2, .*the third"
    ):
        call(Rewards([judge, by_length]))


# --- by name ---


def write(path, text):
    path.write_text(text)
    return path


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path):
    path = write(
        tmp_path / "mine.py", "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(): return 1\n"
    )
    assert load_reward_function(f"{path}:f")() == 1
    assert load_reward_function("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("FILE", ["write file.py:function"]),
        ("FILE:", ["write file.py:function"]),
        ("absent.py:f", ["no file", "absent.py", "Check the path"]),
        ("FILE:lenght", ["no function 'lenght'", "Did you mean 'length'"]),
        ("FILE:zzz", ["no function 'zzz'", "It has length"]),
        ("FILE:LIMIT", ["LIMIT is int, not a function", "length"]),
        ("BROKEN:f", ["raised ZeroDivisionError", "Repair the file"]),
        ("SYNTAX:f", ["raised SyntaxError", "Repair the file"]),
        ("no.such.module:f", ["importing no.such.module raised ModuleNotFoundError", "file.py:function"]),
    ],
)
def test_a_bad_name_says_what_is_wrong_and_what_to_write(tmp_path, name, parts):
    for label, text in {
        "FILE": "LIMIT = 3\ndef length(completions): return []\n",
        "BROKEN": "1 / 0\n",
        "SYNTAX": "def f(:\n",
    }.items():
        name = name.replace(label, str(write(tmp_path / f"{label.lower()}.py", text)))
    with pytest.raises(InputError) as error:
        load_reward_function(name, setting="reward_functions")
    for part in [f"reward_functions={name!r}", *parts]:
        assert part in str(error.value)


# --- reward models ---

SMALL = {"vocab_size": 40, "bos_token_id": 1, "num_labels": 1}


def llama(pad=PAD, eos=EOS, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=pad,
        eos_token_id=eos,
        **(SMALL | options),
    )
    return LlamaForSequenceClassification(config).eval()


def gpt2(pad=PAD, eos=EOS, **options):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=pad, eos_token_id=eos, **(SMALL | options)
    )
    return GPT2ForSequenceClassification(config).eval()


SEQUENCES = [[1, 8, 9, EOS], [1, 8], [1, 8, 9, 10, 11, 12, 13, 14, 15, EOS], [9, 10, 11], [1, 9, EOS, EOS]]
ENDING_IN_PAD = [[1, 8, 9, PAD], [1, PAD, PAD]]


@torch.no_grad()
def stock_scores(model, sequences):
    """Each row alone, without padding, through the model's own forward."""
    return [model(torch.tensor([row])).logits.item() for row in sequences]


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("microbatch_tokens", [1, 12, 1000])
def test_scores_equal_those_of_stock_transformers_on_each_row_alone(build, microbatch_tokens):
    model = build()
    found = RewardModel(model, microbatch_tokens=microbatch_tokens).score(SEQUENCES)
    assert found == pytest.approx(stock_scores(model, SEQUENCES), abs=1e-5)
    assert np.std(found) > 1e-3  # else any row would do


def test_padding_cannot_change_a_score_of_a_model_that_looks_both_ways():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=1, pad_token_id=39, **sizes)).eval()
    assert RewardModel(model).score(SEQUENCES) == pytest.approx(stock_scores(model, SEQUENCES), abs=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("pad", [PAD, 39, None, -1])
def test_the_pad_id_cannot_change_a_score_even_if_a_text_ends_in_it(build, pad):
    model = build(pad=None)
    expected = stock_scores(model, SEQUENCES + ENDING_IN_PAD)  # stock without a pad id: the last token
    model.config.pad_token_id = pad
    assert RewardModel(model).score(SEQUENCES + ENDING_IN_PAD) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("eos", [EOS, [7, EOS]])
def test_a_model_that_pads_with_eos_is_scored_where_stock_transformers_scores_it(build, eos):
    model = build(pad=None, eos=eos)
    at_the_end = stock_scores(model, SEQUENCES)
    model.config.pad_token_id = EOS
    found = RewardModel(model).score(SEQUENCES)
    assert found == pytest.approx(stock_scores(model, SEQUENCES), abs=1e-5)
    assert abs(found[0] - at_the_end[0]) > 1e-4 and found[1] == pytest.approx(at_the_end[1], abs=1e-5)


def test_scoring_is_deterministic_for_a_model_left_in_training_mode_with_dropout():
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    reward_model = RewardModel(model)
    assert reward_model.score(SEQUENCES) == reward_model.score(SEQUENCES)


def test_a_reward_model_is_a_reward_function_among_others():
    model, tokenizer = llama(), make_tokenizer()
    reward_model = RewardModel(model, reward_tokenizer=tokenizer, policy_tokenizer=make_tokenizer(), name="learnt")
    prompt_ids, completion_ids = [ids("a b")] * 4, [[*ids(c), EOS] for c in COMPLETIONS]
    result = Rewards([reward_model, by_length], weights=[1.0, 0.0])(
        prompts=["a b"] * 4, completions=COMPLETIONS, completion_ids=completion_ids, prompt_ids=prompt_ids
    )
    expected = stock_scores(model, [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)])
    assert result.scores == pytest.approx(expected, abs=1e-5) and list(result.per_function) == ["learnt", "by_length"]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("conversational", [True, False])
def test_another_vocabulary_is_scored_on_the_same_text(ended, conversational):
    policy_tokenizer = make_tokenizer(template=PLAIN_TEMPLATE)
    reward_tokenizer = make_tokenizer(template=BOS_TEMPLATE, adds_bos=True, words=WORDS[::-1])
    model = llama()
    reward_model = RewardModel(model, reward_tokenizer=reward_tokenizer).for_policy(policy_tokenizer)
    prompts = [[user("a b")] if conversational else "a b"]
    completion_ids = [[*ids("c d"), *[EOS] * ended]]
    found = reward_model(
        prompts=prompts,
        completions=completion_texts(prompts, completion_ids, policy_tokenizer),
        completion_ids=completion_ids,
    )
    text = "<s>" + ("<|user|> a b <|end|> <|assistant|> c d <|end|>" if conversational else "a b c d") + "</s>" * ended
    expected = reward_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found == pytest.approx(stock_scores(model, [expected]), abs=1e-5)


def test_completions_look_as_users_expect_them():
    tokenizer = make_tokenizer()
    found = completion_texts(["a", [user("a")]], [[*ids("b c"), EOS], [*ids("d"), PAD]], tokenizer)
    assert found == ["b c", [assistant("d")]]


def save(model, path, tokenizer=None):
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def test_a_saved_reward_model_scores_as_before(tmp_path):
    model, tokenizer = llama(), make_tokenizer()
    loaded = RewardModel.load(save(model, tmp_path / "rm", tokenizer), policy_tokenizer=tokenizer)
    assert loaded.name == "rm" and loaded.encoder is None
    assert loaded.score(SEQUENCES) == pytest.approx(stock_scores(model, SEQUENCES), abs=1e-6)
    assert RewardModel.load(save(model, tmp_path / "bare")).score(SEQUENCES) == loaded.score(SEQUENCES)


def causal_lm():
    return LlamaForCausalLM(llama().config)


def headless(path):
    """A checkpoint that says it is a classifier but holds the weights of a bare causal model."""
    model = causal_lm()
    model.save_pretrained(path)
    text = (path / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification")
    (path / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["does not exist", "Give a directory"]),
        (lambda path: path.mkdir(), ["cannot be loaded", "Give the directory"]),
        (
            lambda path: causal_lm().save_pretrained(path),
            ["LlamaForCausalLM", "not a sequence classifier"],
        ),
        (lambda path: llama(num_labels=2).save_pretrained(path), ["has 2 labels", "num_labels=1"]),
        (headless, ["lacks trained weights for score.weight", "reward_model.py"]),
    ],
)
def test_what_is_no_reward_model_says_so_and_how_to_get_one(tmp_path, make, parts):
    make(tmp_path / "rm")
    with pytest.raises(InputError) as error:
        RewardModel.load(tmp_path / "rm")
    for part in ["reward_model=", "rm", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("sequences", "parts"),
    [
        ([[1, 2], [1, 40]], ["row 1", "token 40", "embeds 40"]),
        ([[1] * 65], ["row 0", "65 tokens", "64", "max_new_tokens"]),
        ([[]], ["row 0", "no tokens"]),
    ],
)
def test_tokens_that_the_model_cannot_read_are_named_by_row(sequences, parts):
    with pytest.raises(InputError) as error:
        RewardModel(llama()).score(sequences)
    for part in parts:
        assert part in str(error.value)


def test_prompt_ids_are_asked_for_by_name():
    with pytest.raises(InputError, match="pass prompt_ids"):
        call(Rewards(RewardModel(llama())))


def test_a_model_that_scores_nan_is_refused_with_its_row():
    model = llama()
    torch.nn.init.constant_(model.score.weight, math.nan)
    with pytest.raises(InputError, match=r"'reward_model' returned nan for row 0"):
        call(Rewards(RewardModel(model)), prompt_ids=[[8]] * 4)
