"""Reward models: padding, offset and position in the batch cannot change a score, and bad ones are refused by name."""

import math

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
from rlhf.rewards.combine import Rewards, completion_texts
from rlhf.rewards.model import RewardModel
from tests.data.texts import BOS_TEMPLATE, EOS, PAD, PLAIN_TEMPLATE, WORDS, assistant, ids, make_tokenizer, user
from tests.rewards.batch import COMPLETIONS, by_length, call
from tests.rounding import EPS

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
    assert found == pytest.approx(stock_scores(model, SEQUENCES), abs=2048 * EPS)
    assert np.std(found) > 1e-3  # else any row would do


def test_padding_cannot_change_a_score_of_a_model_that_looks_both_ways():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=1, pad_token_id=39, **sizes)).eval()
    assert RewardModel(model).score(SEQUENCES) == pytest.approx(stock_scores(model, SEQUENCES), abs=2048 * EPS)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("pad", [PAD, 39, None, -1])
def test_the_pad_id_cannot_change_a_score_even_if_a_text_ends_in_it(build, pad):
    model = build(pad=None)
    expected = stock_scores(model, SEQUENCES + ENDING_IN_PAD)  # stock without a pad id: the last token
    model.config.pad_token_id = pad
    assert RewardModel(model).score(SEQUENCES + ENDING_IN_PAD) == pytest.approx(expected, abs=2048 * EPS)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("eos", [EOS, [7, EOS]])
def test_a_model_that_pads_with_eos_is_scored_where_stock_transformers_scores_it(build, eos):
    model = build(pad=None, eos=eos)
    at_the_end = stock_scores(model, SEQUENCES)
    model.config.pad_token_id = EOS
    found = RewardModel(model).score(SEQUENCES)
    assert found == pytest.approx(stock_scores(model, SEQUENCES), abs=2048 * EPS)
    assert abs(found[0] - at_the_end[0]) > 1e-4 and found[1] == pytest.approx(at_the_end[1], abs=2048 * EPS)


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
    assert result.scores == pytest.approx(expected, abs=2048 * EPS) and list(result.per_function) == [
        "learnt",
        "by_length",
    ]


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
    assert found == pytest.approx(stock_scores(model, [expected]), abs=2048 * EPS)


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
    assert loaded.score(SEQUENCES) == pytest.approx(stock_scores(model, SEQUENCES), abs=128 * EPS)
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
