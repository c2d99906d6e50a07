"""The policy's scoring forward against the definition: each sequence alone, through stock transformers, one row at a time.

Nothing that a batch does to a row (neighbours, padding, its token id, pad = EOS, chunks) may change the
row's log-probs, values or reward score.
"""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.errors import InputError
from rlhf.models.loading import check_vocabulary, load_causal_lm
from rlhf.models.policy import Policy
from rlhf.models.reference import frozen_copy
from rlhf.rewards.model import RewardModel
from rlhf.training.weights import fingerprint, load_named_tensors, named_tensors
from tests import tiny
from tests.rounding import EPS

TEMPERATURE = 0.7

PROMPTS = tiny.sequences(6, seed=1)
COMPLETIONS = [[*row, tiny.EOS] for row in tiny.sequences(5, seed=2)] + [[tiny.EOS]]


def make_policy(
    family: str, dtype: torch.dtype = torch.float64, *, temperature: float = TEMPERATURE, **changes
) -> Policy:
    policy = Policy(tiny.causal_lm(family, dtype=dtype, **changes), temperature=temperature, critic="head")
    tiny.randomise(policy.critic.head)
    return policy


def oracle(policy: Policy, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and entropies of one completion by their definitions, from the stock model's own outputs."""
    with torch.no_grad():
        outputs = policy.lm(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
    before = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)  # the position that predicts each token
    logprobs = (outputs.logits[0, before] / policy.temperature).log_softmax(-1)
    head = policy.critic.head.linear
    values = (outputs.hidden_states[-1][0, before] * head.weight[0]).sum(-1) + head.bias
    chosen = torch.stack([logprobs[t, token] for t, token in enumerate(completion)])
    return chosen, values.detach(), -(logprobs.exp() * logprobs).sum(-1)


def forward(policy: Policy, prompts, completions, *, pad: int = tiny.PAD, extra: int = 0, grad: bool = False):
    """The batch as the trainer lays it out: right-padded, here with `extra` more columns and any pad token."""

    def padded(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows)) + extra
        return torch.tensor([row + [pad] * (width - len(row)) for row in rows])

    inputs = {
        "input_ids": padded([p + c for p, c in zip(prompts, completions, strict=True)]),
        "prompt_lengths": torch.tensor([len(p) for p in prompts]),
    }
    with torch.set_grad_enabled(grad):
        return policy(inputs, padded(completions), with_values=True, with_entropy=True)


def assert_rows_match(policy: Policy, outputs, prompts, completions, tolerance: float) -> None:
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = oracle(policy, prompt, completion)
        for got, wanted in zip((outputs.logprobs, outputs.values, outputs.entropy), expected, strict=True):
            torch.testing.assert_close(got[row, : len(completion)], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), tiny.PRECISIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout", [{}, {"extra": 5}, {"pad": 7, "extra": 2}, {"pad": tiny.EOS, "extra": 1}])
def test_logprobs_values_and_entropies_are_those_of_each_sequence_alone(family, dtype, tolerance, layout):
    policy = make_policy(family, dtype)
    outputs = forward(policy, PROMPTS, COMPLETIONS, **layout)
    assert_rows_match(policy, outputs, PROMPTS, COMPLETIONS, tolerance)


@pytest.mark.parametrize("wrong", ["offset", "temperature"])
def test_the_comparison_notices_a_wrong_offset_and_a_forgotten_temperature(wrong):
    policy = make_policy("llama")
    outputs = forward(policy, PROMPTS, COMPLETIONS)
    if wrong == "temperature":
        policy.temperature = 1.0
        prompts = PROMPTS
    else:
        prompts = [[*p, 3] for p in PROMPTS]
    with pytest.raises(AssertionError):
        assert_rows_match(policy, outputs, prompts, COMPLETIONS, 1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scoring_chunk_by_chunk_changes_neither_numbers_nor_gradients(family):
    """Logits of a long batch are made a few tokens at a time and again in the backward pass."""
    whole, pieces = make_policy(family), make_policy(family)
    pieces.chunk_tokens = 5
    gradients = []
    for policy in (whole, pieces):
        outputs = forward(policy, PROMPTS, COMPLETIONS, grad=True)
        assert_rows_match(policy, outputs, PROMPTS, COMPLETIONS, 1e-10)
        (outputs.logprobs.sum() + 0.3 * outputs.entropy.sum() + outputs.values.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)


TRANSFORMED = {
    "gemma2": {"final_logit_softcapping": 2.0, "num_key_value_heads": 1, "head_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "nanochat": {"final_logit_softcapping": 2.0},
    "phi": {},  # a bias in the output layer
    "gpt_neox": {},  # an output layer of another name
    "opt": {"ffn_dim": 24},  # does not call its own body, but a part of that
}


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_models_whose_logits_are_more_than_the_output_layer_are_scored_by_their_own_logits(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.5}
    sizes |= {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **TRANSFORMED[kind])).double().eval()
    for parameter in lm.parameters():
        if parameter.dim() == 1:  # biases start at 0
            parameter.data += 0.3
    policy = Policy(lm, temperature=TEMPERATURE, critic="head")
    # transformers computes parts of these (norms, soft caps) in float32 whatever the weights are
    assert_rows_match(policy, forward(policy, PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, 2048 * EPS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_plain_output_layer_is_known_as_such_also_if_the_model_comes_in_training_mode(family):
    """Then logits are made in chunks, and not by a second forward of the whole model."""
    assert not Policy(tiny.causal_lm(family, dropout=0.5).train())._own_forward


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dropout_never_acts_whatever_mode_is_asked_for(family):
    policy = make_policy(family, dropout=0.5)
    quiet = forward(policy, PROMPTS, COMPLETIONS)
    policy.train()
    policy.train(True)
    assert not any(module.training for module in policy.modules())
    torch.testing.assert_close(
        forward(policy, PROMPTS, COMPLETIONS, grad=True).logprobs, quiet.logprobs, rtol=0, atol=0
    )


def test_a_model_left_in_training_mode_is_put_into_eval_mode():
    lm = tiny.causal_lm("gpt2", dropout=0.5).train()
    assert not any(module.training for module in Policy(lm).modules())
    assert not any(module.training for module in frozen_copy(lm.train(), temperature=1.0).module.modules())


def test_a_new_value_head_has_no_opinion_and_works_in_float32_or_wider():
    policy = Policy(tiny.causal_lm(dtype=torch.bfloat16), critic="head")
    assert policy.critic.head.linear.weight.dtype == torch.float32
    outputs = forward(policy, PROMPTS, COMPLETIONS)
    assert outputs.values.dtype == torch.float32 and not outputs.values.any()
    assert make_policy("llama").critic.head.linear.weight.dtype == torch.float64


def test_the_reference_is_a_copy_that_training_does_not_move():
    lm = tiny.causal_lm(dtype=torch.float64)
    reference = frozen_copy(lm, temperature=TEMPERATURE)
    before = copy.deepcopy(lm.state_dict())
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())
    for parameter in lm.parameters():
        parameter.data += 1.0
    torch.testing.assert_close(reference.module.lm.state_dict(), before, rtol=0, atol=0)


# --- the reward model ---------------------------------------------------------------------------------------------------

WHOLE = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def stock_score(model, ids: list[int]) -> float:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


@pytest.mark.parametrize(("dtype", "tolerance"), tiny.PRECISIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS, 7])
def test_a_reward_score_is_that_of_the_sequence_alone_through_stock_transformers(family, dtype, tolerance, pad):
    """Also where a completion holds the pad token itself, and where padding is the EOS token."""
    model = tiny.reward_model(family, dtype=dtype, pad_token_id=pad)
    tiny.randomise(model.score)
    together = RewardModel(model).score(WHOLE)
    few_at_once = RewardModel(model, microbatch_tokens=9).score(WHOLE)
    backwards = RewardModel(model).score(WHOLE[::-1])[::-1]
    for scores in (together, few_at_once, backwards):
        for ids, score in zip(WHOLE, scores, strict=True):
            if pad != 7 or ids[-1] != 7:
                assert score == pytest.approx(stock_score(model, ids), abs=tolerance)


def test_the_pad_id_of_a_reward_model_changes_no_score():
    scores = []
    for pad in (tiny.PAD, 7):
        model = tiny.reward_model("gpt2", pad_token_id=pad)
        tiny.randomise(model.score)
        scores.append(RewardModel(model).score(WHOLE))
    assert scores[0] == pytest.approx(scores[1], abs=2048 * EPS)


# --- weights to and from checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_named_tensors_restore_every_parameter_bit_for_bit_tied_weights_included(family):
    tied = {"tie_word_embeddings": family != "llama"}
    policy, other = make_policy(family, **tied), make_policy(family, **tied)
    for parameter in other.parameters():
        parameter.data += 1.0
    saved = {name: tensor.clone() for name, tensor in named_tensors(policy).items()}
    load_named_tensors(other, saved)
    restored, wanted = other.state_dict(), policy.state_dict()
    assert all(torch.equal(restored[name], wanted[name]) for name in wanted)


def test_weights_of_another_model_are_refused_and_the_difference_is_named():
    policy = make_policy("llama")
    with pytest.raises(InputError, match="mlp"):
        load_named_tensors(policy, named_tensors(make_policy("llama", intermediate_size=32)))
    with pytest.raises(InputError, match="critic"):
        load_named_tensors(policy, named_tensors(Policy(tiny.causal_lm("llama", dtype=torch.float64))))


def test_the_fingerprint_of_a_model_tells_small_changes():
    lm = tiny.causal_lm()
    first = fingerprint(lm)
    assert fingerprint(tiny.causal_lm()) == first
    weight = next(lm.parameters())
    weight.data[0, 0] += 1e-4
    assert fingerprint(lm) != first


def test_the_fingerprint_of_a_model_tells_swapped_rows():
    """Tokens swapped in the embedding are another model, although every sum stays the same."""
    lm = tiny.causal_lm()
    first = fingerprint(lm)
    weight = next(lm.parameters())
    weight.data[[3, 4]] = weight.data[[4, 3]]
    assert fingerprint(lm) != first


def test_a_model_saved_in_bfloat16_is_trained_in_float32(tmp_path):
    lm = tiny.causal_lm(dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.get_input_embeddings().weight, lm.get_input_embeddings().weight.float())


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_missing_model_directory_is_named_before_anything_is_loaded(path):
    with pytest.raises(InputError, match=r"policy: there is no directory .*nowhere.*save_pretrained"):
        load_causal_lm(path)


def test_a_directory_without_a_model_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"policy: cannot load .*save_pretrained"):
        load_causal_lm(str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused_and_both_sizes_named():
    with pytest.raises(InputError, match=r"has 11 tokens.*embeds only 8.*resize_token_embeddings"):
        check_vocabulary(tiny.causal_lm(vocab_size=8), tiny.tokenizer())
