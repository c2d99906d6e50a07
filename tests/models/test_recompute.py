"""Gradient checkpointing: layers are computed again in the backward pass, and nothing else changes, to the bit."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OpenAIGPTConfig,
    OPTConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import InputError
from rlhf.distributed import Distributed
from rlhf.models import recompute
from rlhf.models.adapters import Adapters, adapted
from rlhf.models.policy import Policy
from rlhf.models.recompute import recompute_layers
from rlhf.models.reference import AdapterReference
from rlhf.rollout.engine import Key, Request, Sampling
from rlhf.rollout.in_process import InProcessEngine
from rlhf.runs.jsonlines import read_metrics
from tests import adapters as runs
from tests import tiny
from tests.adapters import IDS, lora

INPUTS = {"input_ids": IDS, "prompt_lengths": torch.tensor([3, 2])}
ACTIONS = IDS[:, 3:]
LAYERS = 2


def language_model(family: str):
    """With dropout, which acts in no mode of the policy, and would if checkpointing put the layers into training mode."""
    if family != "opt":
        return tiny.causal_lm(family, dropout=0.5)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "vocab_size": tiny.VOCABULARY, "init_std": 0.5}
    tokens = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    return tiny._seeded(AutoModelForCausalLM, OPTConfig(**sizes, **tokens, **rates), 0, torch.float32)


def make_policy(family: str, kind: str) -> Policy:
    lm = language_model(family)
    if kind == "head":
        policy = Policy(lm, critic="head")
    elif kind == "own model":
        critic = tiny._seeded(
            AutoModelForSequenceClassification, tiny.config("gpt2", num_labels=1, dropout=0.5), 1, torch.float32
        )
        policy = Policy(lm, critic=critic)
    else:
        adapters = Adapters.add(lm, lora(lora_dropout=0.5, init_lora_weights=False))
        policy = Policy(lm, adapters=adapters, critic="adapter" if kind == "value adapter" else "head")
        if kind == "value adapter":
            for name, parameter in lm.named_parameters():
                if ".critic." in name:  # far from the policy's
                    parameter.data += 0.1
    if hasattr(policy.critic, "head"):
        tiny.randomise(policy.critic.head)
    return policy


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    outputs = policy(INPUTS, ACTIONS, with_values=True, with_entropy=True)
    (outputs.logprobs.sum() + outputs.values.square().sum() + 0.1 * outputs.entropy.sum()).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def count(policy: Policy) -> Counter:
    """Counts the forwards of the layers of policy and critic, recomputed ones included."""
    forwards: Counter = Counter()
    for name, layer in policy.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            inner = next(part for _, part in layer.named_children())  # called once in each forward of the layer
            inner.register_forward_pre_hook(lambda *_, name=name: forwards.update([name]))
    return forwards


KINDS = ("head", "own model", "adapter", "value adapter")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_gradients_are_equal_to_the_bit_and_each_layer_is_computed_twice(family, kind):
    plain, again = make_policy(family, kind), make_policy(family, kind)
    recompute_layers(again)
    forwards, recomputed = count(plain), count(again)
    wanted, found = gradients(plain), gradients(again)
    assert equal(found, wanted) and any(g.any() for g in wanted.values())
    assert len(forwards) == (4 if kind == "own model" else 2)
    passes = 2 if kind == "value adapter" else 1  # the shared layers compute for the policy and for the critic
    assert set(forwards.values()) == {passes} and set(recomputed.values()) == {2 * passes}
    if again.adapters is not None:
        assert again.adapters.active_name == "default"


def test_the_comparison_notices_layers_that_are_recomputed_with_the_wrong_adapter(monkeypatch):
    plain, again = make_policy("gpt2", "value adapter"), make_policy("gpt2", "value adapter")
    monkeypatch.setattr(recompute, "_same_adapter", lambda policy: (nullcontext(), nullcontext()))
    recompute_layers(again)
    assert not equal(gradients(again), gradients(plain))


def test_the_comparison_notices_layers_in_training_mode():
    """As transformers' own switch needs them."""
    plain, again = make_policy("gpt2", "head"), make_policy("gpt2", "head")
    recompute_layers(again)
    for layer in again.lm.transformer.h:
        layer.train()
    assert not equal(gradients(again), gradients(plain))


def test_the_reference_of_the_same_base_is_not_recomputed():
    lm, adapters = adapted(runs.trained_peft())
    policy = Policy(lm, adapters=adapters, critic="head")
    reference = AdapterReference(policy)
    recompute_layers(policy)
    forwards = count(policy)
    with torch.no_grad():
        reference(INPUTS, ACTIONS)
    assert set(forwards.values()) == {1}


def test_sampling_computes_each_layer_once_per_token_and_keeps_the_cache(distributed: Distributed):
    """One forward for the prompt and one for each further token, of one token: with the cache lost it would be more."""
    completions = []
    for recomputes in (False, True):
        policy = make_policy("llama", "head")
        if recomputes:
            recompute_layers(policy)
        forwards, widths = count(policy), []
        policy.lm.get_input_embeddings().register_forward_pre_hook(lambda _, args, w=widths: w.append(args[0].shape[1]))
        engine = InProcessEngine(policy, distributed)
        sampling = Sampling(max_new_tokens=5, temperature=1.0, end_ids=())
        requests = [Request(ids=[3, 4, 5], key=Key(0, 0, 0, 0, 0, 0))]
        completions.append([f.result().ids for f in engine.submit(requests, sampling)])
        assert widths == [3, 1, 1, 1, 1] and set(forwards.values()) == {5}
    assert completions[0] == completions[1] and len(completions[0][0]) == 5


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_a_run_with_gradient_checkpointing_leaves_the_same_bytes(critic, tmp_path):
    found = []
    for recomputes in (False, True):
        out = tmp_path / str(recomputes)
        own = {"peft_config": lora(lora_dropout=0.3)} if critic == "adapter" else {}
        model = tiny.reward_model("gpt2") if critic == "model" else critic
        trainer = tiny.trainer(
            out, lm=tiny.causal_lm("gpt2"), critic=model, gradient_checkpointing=recomputes, total_steps=2, **own
        )
        trainer.train()
        found.append((read_metrics(out), tiny.weights(trainer)))
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1])


def test_a_model_without_such_layers_is_refused():
    config = OpenAIGPTConfig(vocab_size=tiny.VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    lm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"gradient_checkpointing: OpenAIGPTLMHeadModel has no layers"):
        recompute_layers(Policy(lm))
